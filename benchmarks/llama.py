"""Does llama.cpp compute the same as the runs, and how fast? Converts runs to GGUF and loads them in llama.cpp.

    python benchmarks/llama.py runs/v3 results/best    these models; without names also v4 with RoPE. The results go to
                                                       results/benchmarks/
    python benchmarks/llama.py --quick runs/v3         a short text; writes nothing

For each model it compares the ids of the validation text, the logits in a window, 50 tokens of greedy continuation,
perplexity per token in windows side by side, and tokens per second of generation. In F32, logits may differ by at most
1e-2 (llama.cpp reads GELU from a table); keys and values are then kept in F32, too, and not in F16 as llama.cpp usually
does. `pip install -r benchmarks/requirements.txt` builds llama-cpp-python, which needs g++, cmake and some minutes.
"""

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import convert_gguf  # noqa: E402
import convert_hf  # noqa: E402
import harness  # noqa: E402
from benchmarks.tables import keep, machine, table  # noqa: E402
from data import load_tokens  # noqa: E402

WINDOWS, QUICK_WINDOWS = 100, 8  # to measure perplexity on
GREEDY = 50  # tokens
TOLERANCE = 1e-2  # of logits in F32
PROMPT = " The castle was"


def nats(logits, ids):
    """Total loss of predicting ids[1:] from logits[:-1], both for one window."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()


def read_there(llama, ids):
    """llama.cpp's logits (T, V) for one window."""
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)]))


def continue_there(llama, ids, n_tokens):
    """llama.cpp's greedy continuation."""
    llama.reset()
    llama.eval(ids)
    for i in range(n_tokens):
        token = int(llama.scores[llama.n_tokens - 1].argmax())
        yield token
        if i < n_tokens - 1:
            llama.eval([token])


def timed(tokens):
    """(the tokens of an iterator, tokens per second)."""
    start = time.perf_counter()
    tokens = list(tokens)
    return tokens, len(tokens) / (time.perf_counter() - start)


@torch.no_grad()
def compare(run, n_windows, folder):
    """{"ours": ..., dtype: ...} for a run: dicts of measurements."""
    from llama_cpp import GGML_TYPE_F32, Llama

    model, tokenizer = harness.load(run)
    rung, T = sys.modules[type(model).__module__], model.block_size
    val = load_tokens("bpe_vocab.json")["val"]
    text = tokenizer.decode(val.ids[: n_windows * T].tolist() if n_windows == QUICK_WINDOWS else val.ids.tolist())
    expected = tokenizer.encode(text, tokenizer.special_tokens)
    windows = val.ids[: n_windows * T].long().view(n_windows, T)
    ours = [model(window[None])[0].float() for window in windows]
    prompt = tokenizer.encode(PROMPT)
    with harness.override(vars(rung), TEMPERATURE=0, DEVICE="cpu"):
        greedy, rate = timed(rung.generate(model, prompt, GREEDY))
    count = n_windows * (T - 1)
    results = {"ours": {"ppl": math.exp(sum(map(nats, ours, windows)) / count), "rate": rate}}
    for dtype in convert_gguf.DTYPES:
        path = Path(folder) / f"{dtype}.gguf"
        with contextlib.redirect_stdout(io.StringIO()):
            convert_hf.export_gguf(run, path, dtype)
        kept = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32} if dtype == "F32" else {}
        llama = Llama(str(path), n_ctx=T, n_batch=T, n_threads=torch.get_num_threads(), logits_all=True, verbose=False,
                      **kept)  # fmt: skip
        theirs = [read_there(llama, window.tolist()) for window in windows]
        tokens, rate = timed(continue_there(llama, prompt, GREEDY))
        results[dtype] = {
            "same_ids": llama.tokenize(text.encode(), add_bos=False, special=True) == expected,
            "difference": max((a - b).abs().max().item() for a, b in zip(ours, theirs)),
            "same_greedy": tokens == greedy, "ppl": math.exp(sum(map(nats, theirs, windows)) / count), "rate": rate,
            "bytes": path.stat().st_size,
        }  # fmt: skip
        llama.close()
    f32 = results["F32"]
    if not (f32["same_ids"] and f32["same_greedy"] and f32["difference"] < TOLERANCE):
        raise ValueError(f"{run}: llama.cpp computes something else: {f32}")
    return results


def report(results):
    """The results as Markdown."""
    rows = []
    for run, by_dtype in results["runs"].items():
        for dtype, r in by_dtype.items():
            there = ["–"] * 4
            if dtype != "ours":
                same = ["yes" if r[key] else "no" for key in ("same_ids", "same_greedy")]
                there = [same[0], f"{r['difference']:.1e}", same[1], f"{r['bytes'] / 1e6:.1f}"]
            program = "PyTorch" if dtype == "ours" else f"llama.cpp, {dtype}"
            rows.append([run, program, f"{r['ppl']:.3f}", f"{r['rate']:.0f}", *there])
    head = ["run", "program", "perplexity", "tokens/s", "same ids", "logits differ by", "same 50 tokens", "MB"]
    return (f"{table(head, rows, left=(0, 1))}\nPerplexity per token on {results['windows']} windows of the validation "
            f"split, side by side. Speed of a greedy continuation, a single measurement.\nMachine: "
            f"{results['machine']}, llama-cpp-python {results['version']}.\n")  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description="Runs as GGUF in llama.cpp, compared with what they compute here.")
    parser.add_argument("runs", nargs="*", default=["runs/v3", "runs/v4_alibi_rope/rope", "results/best"])
    parser.add_argument("--quick", action="store_true", help="a short text; write nothing")
    args = parser.parse_args(argv)
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise harness.UserError("this needs llama.cpp: pip install -r benchmarks/requirements.txt") from None
    n_windows = QUICK_WINDOWS if args.quick else WINDOWS
    with tempfile.TemporaryDirectory() as folder:
        runs = {run: compare(run, n_windows, folder) for run in args.runs}
    results = {"machine": machine(), "version": llama_cpp.__version__, "windows": n_windows,
               "date": time.strftime("%Y-%m-%d"), "runs": runs}  # fmt: skip
    text = report(results)
    print(text, end="")
    if not args.quick:
        keep("llama_cpp", results, text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("llama.py: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit(f"llama.py: {error}")
