"""What people would run instead, on the same text, the same cores, for the same time.

    python benchmarks/baselines.py --examples DIR --nanogpt DIR --from DIR    the missing runs, then the table
    python benchmarks/baselines.py --table                                    only the table, from finished runs
    python benchmarks/baselines.py ... "nanoGPT, small"                       one program

The three DIR are checkouts of https://github.com/pytorch/examples and https://github.com/karpathy/nanoGPT, and the
folder with WikiText-2 (wiki.train.tokens, ...). Every program gets the time that the slowest rung of the ladder takes
to train on the same idle machine (results/experiments/step_time.json). It runs once with each of three learning rates;
the one that is best on the validation split counts.

- word_language_model uses whole words as its vocabulary. Its own schedule waits for the end of an epoch, which does not
  come in that time; so an alarm lowers its rate to zero, linearly, once a second, then saves the weights and ends it as
  Ctrl-C would. Nothing else is changed. Its perplexity counts every word and end of line.
- nanoGPT runs with its settings for small machines (its README, "I only have a macbook"), and with v3's shape. It
  gets the tokens of this repository. A short trial finds how many steps fit in the time, at the end of which its cosine
  schedule ends, too. Its weights are evaluated here over whole splits, in windows side by side.

The table has the ladder's runs of v2, v3 and v4, too, and the n-gram model of words (benchmarks/ngram.py).
"""

import argparse
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import RESULTS, machine, table  # noqa: E402

WORK = ROOT / "runs" / "baselines"
WORDS = {  # {name: (arguments, learning rates)}
    "word_language_model, LSTM": ("--tied", (10, 20, 40)),
    "word_language_model, Transformer": ("--model Transformer", (2.5, 5, 10)),
    "word_language_model, Transformer, AdamW": ("--model Transformer --use-optimizer", (5e-4, 1e-3, 2e-3)),
}
SMALL = ("config/train_shakespeare_char.py --device=cpu --eval_iters=20 --log_interval=1 "
         "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0")  # fmt: skip
OURS = ("--device=cpu --eval_iters=20 --log_interval=1 --gradient_accumulation_steps=1 --block_size=256 "
        "--batch_size=16 --n_layer=4 --n_head=4 --n_embd=256 --bias=True --warmup_iters=60")  # fmt: skip
NANO = {"nanoGPT, small": (SMALL, (1e-3, 2e-3, 4e-3)), "nanoGPT, v3's shape": (OURS, (1e-3, 2e-3, 4e-3))}
TRIAL, WARM_UP = 40, 10  # steps
SHOWN = ("v2", "v3", "v4, alibi", "v4, rope")  # rungs that the table has


def run_words(seconds, arguments):
    """Run main.py of word_language_model for `seconds` of training, during which its rate falls to zero. They begin
    with the first alarm after it has read the text. Runs in a separate process, in that folder."""
    end = None

    def tick(number, frame):
        import torch  # main.py has done so

        nonlocal end

        while frame and "train" not in frame.f_globals:  # the frame of main.py
            frame = frame.f_back
        program = frame.f_globals if frame else {}
        if "lr" not in program:
            return  # it has not begun to train
        end = end or time.monotonic() + seconds
        left = (end - time.monotonic()) / seconds
        if left > 0:
            program["lr"] = program["args"].lr * min(1.0, left)
            for group in program["optimizer"].param_groups if "optimizer" in program else ():
                group["lr"] = program["lr"]
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"baselines: validation loss {program['evaluate'](program['val_data'])}")
        torch.save(program["model"], program["args"].save)
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, tick)
    sys.argv = ["main.py", *arguments]
    sys.path.insert(0, ".")
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    runpy.run_path("main.py", run_name="__main__")


def words(name, rate, folder, source, seconds):
    """Train and evaluate word_language_model. Raises ValueError if it fails."""
    data = WORK / "words"
    data.mkdir(parents=True, exist_ok=True)
    for ours, theirs in (("train", "train"), ("valid", "valid"), ("test", "test")):
        shutil.copyfile(source / f"wiki.{ours}.tokens", data / f"{theirs}.txt")
    save = WORK / f"{name.replace(', ', '-')}.pt"
    options = f"--epochs 40 {WORDS[name][0]} --lr {rate:g}"
    arguments = ["--data", str(data), "--save", str(save), *options.split()]
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--inside", str(seconds), *arguments],
                          cwd=folder / "word_language_model", capture_output=True, text=True)  # fmt: skip
    val = re.search(r"baselines: validation loss (\S+)", done.stdout)
    test = re.search(r"\| test loss +(\S+)", done.stdout)
    steps = re.findall(r"\| epoch +(\d+) \| +(\d+)/ *(\d+) batches .* ms/batch +(\S+)", done.stdout)
    if not val or not test or not steps:  # it reports every 200 batches
        raise ValueError(f"{name} has failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    epoch, batch, batches, _ = map(float, steps[-1])
    return {"command": f"python main.py {options}", "val_word_ppl": math.exp(float(val[1])),
            "test_word_ppl": math.exp(float(test[1])), "epochs": epoch - 1 + batch / batches,
            "ms_a_step": median(float(ms) for *_, ms in steps),
            "log": done.stdout.replace(str(ROOT), ".").splitlines()}  # fmt: skip


def nano_data(folder):
    """Write the tokens of this repository where nanoGPT looks for them; returns them, {split: Tokens}."""
    from data import load_tokens

    dataset, tokens = folder / "data" / "wikitext", load_tokens("bpe_vocab.json")
    dataset.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        tokens[split].ids.numpy().tofile(dataset / f"{split}.bin")
    (dataset / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4096}))
    return tokens


def word_perplexity(model, tokens, size):
    """Word perplexity of nanoGPT's model over a whole split, in windows of `size` tokens side by side."""
    import torch
    import torch.nn.functional as F

    ids, nats = tokens.ids.long(), 0.0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, size):
            y = ids[i + 1 : i + size + 1]
            logits, _ = model(ids[None, i : i + len(y)], y[None])  # with targets it gives the logits of all places
            nats += F.cross_entropy(logits[0].double(), y, reduction="sum").item()
    return math.exp(nats / tokens.n_words)


def nano(name, rate, folder, seconds):
    """Train and evaluate nanoGPT. Raises ValueError if it fails."""
    import torch

    tokens, out = nano_data(folder), WORK / name.replace(", ", "-").replace(" ", "-")
    options = f"{NANO[name][0]} --learning_rate={rate:g} --min_lr={rate / 10:g} --dataset=wikitext"
    command = [sys.executable, "train.py", *options.split(), f"--out_dir={out}"]

    def train(steps, interval):
        limits = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={interval}"]
        return subprocess.run([*command, *limits], cwd=folder, capture_output=True, text=True)

    def step_times(done):  # ms
        ms = [float(x) for x in re.findall(r"iter \d+: .* time (\S+)ms", done.stdout)]
        if done.returncode or len(ms) < TRIAL:
            raise ValueError(f"{name} has failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
        return ms

    steps = round(1000 * seconds / median(step_times(train(TRIAL, 10_000))[WARM_UP:]))
    done = train(steps, steps)
    ms = step_times(done)
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig

    saved = torch.load(out / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
    size = saved["model_args"]["block_size"]
    batch = saved["config"]["batch_size"]
    return {"command": f"python train.py {options} --max_iters={steps} --lr_decay_iters={steps}",
            "val_word_ppl": word_perplexity(model, tokens["val"], size),
            "test_word_ppl": word_perplexity(model, tokens["test"], size), "ms_a_step": median(ms[WARM_UP:]),
            "train_seconds": sum(ms[1:steps]) / 1000, "epochs": steps * batch * size / len(tokens["train"]),
            "log": [line.replace(str(ROOT), ".") for line in done.stdout.splitlines()[::50]]}  # fmt: skip


def commit(folder):
    """The commit of a checkout, from its file COMMIT or from git."""
    if (folder / "COMMIT").exists():
        return (folder / "COMMIT").read_text().strip()
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()


def ladder_seconds():
    """{name of a rung's run: seconds of its training, evaluations aside, on an idle machine}"""
    from results import step_time
    from results.plan import EXPERIMENTS
    from results.store import results_of

    results = results_of("ladder")
    return {run.name: results[run.name][0]["summary"]["steps"] * step_time.seconds_of(run)
            for run in EXPERIMENTS["ladder"].runs}  # fmt: skip


def report(results):
    """The table, with the rows of this repository from its experiments."""
    from results.store import read_json, results_of, spread

    rows, seconds = [], ladder_seconds()
    for name, found in results_of("ladder").items():
        if name in SHOWN:
            summaries = [result["summary"] for result in found]
            columns = [[summary.get(key) for summary in summaries] for key in ("val_word_ppl", "test_word_ppl")]
            cells = [spread(column, "{:.1f}") for column in columns]
            rows.append((median(columns[0]), [name, "–", *cells, f"{summaries[0]['epochs']:.2f}",
                                              f"{seconds[name]:.0f}"]))  # fmt: skip
    for name, tries in results["peers"].items():
        best = min(tries, key=lambda one: one["val_word_ppl"])
        others = [f"{one['rate']:g}: {one['val_word_ppl']:.1f}" for one in tries if one is not best]
        rows.append((best["val_word_ppl"], [name, f"{best['rate']:g}" + f" ({'; '.join(others)})" * bool(others),
                                            f"{best['val_word_ppl']:.1f}", f"{best['test_word_ppl']:.1f}",
                                            f"{best['epochs']:.2f}", f"{results['seconds']}"]))  # fmt: skip
    counted = min(read_json(RESULTS / "ngram.json")["words"], key=lambda one: one["val_word_ppl"])
    rows.append((counted["val_word_ppl"], [f"{counted['order']}-gram of words", "–", f"{counted['val_word_ppl']:.1f}",
                                           f"{counted['test_word_ppl']:.1f}", "1.00", f"{counted['seconds']:.0f}"]))
    rows = [row for _, row in sorted(rows, key=lambda row: -row[0])]
    return (table(["model", "learning rate (others: val word ppl)", "val word ppl", "test word ppl",
                   "times the text was read", "seconds"], rows, left=(0, 1))
            + f"\nMachine: {results['machine']}.\n")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="What people would run instead.", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([*WORDS, *NANO])}")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="checkout of pytorch/examples")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="checkout of karpathy/nanoGPT")
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="WikiText-2")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    path = RESULTS / "beside.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"peers": {}}
    if not args.table:
        for option in ("examples", "nanogpt", "source"):
            if getattr(args, option) is None or not getattr(args, option).is_dir():
                raise ValueError(f"--{option.replace('source', 'from')} must name a folder")
        if results.setdefault("machine", machine()) != machine():
            raise ValueError(f"{path.name} has the runs of another machine; remove it to make all of them here")
        results.setdefault("seconds", math.ceil(max(ladder_seconds().values())))
    for name in () if args.table else args.names or [*WORDS, *NANO]:
        if name not in {**WORDS, **NANO}:
            raise ValueError(f"there is no {name!r}; choose from {', '.join([*WORDS, *NANO])}")
        folder = (args.examples if name in WORDS else args.nanogpt).resolve()
        tries = results["peers"].setdefault(name, [])
        for rate in {**WORDS, **NANO}[name][1]:
            if any(one["rate"] == rate for one in tries):
                continue
            found = (words(name, rate, folder, args.source, results["seconds"]) if name in WORDS else
                     nano(name, rate, folder, results["seconds"]))  # fmt: skip
            tries.append({"rate": rate, "commit": commit(folder), "date": time.strftime("%Y-%m-%d"), **found})
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{name}, rate {rate:g}: word perplexity {found['val_word_ppl']:.1f}, on the test split "
                  f"{found['test_word_ppl']:.1f}")  # fmt: skip
    text = report(results)
    print(text, end="")
    (RESULTS / "beside.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        run_words(int(sys.argv[2]), sys.argv[3:])
        sys.stdout.flush()
        os._exit(0)  # threads of libraries may be anywhere
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"baselines.py: {error}")
