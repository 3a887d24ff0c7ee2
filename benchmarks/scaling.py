"""How much several devices gain: v3 in one and in two processes here, and an estimate for GPUs.

    python benchmarks/scaling.py         two processes of one thread each on the CPU, and the estimate: a minute
    python benchmarks/scaling.py --gpu   one process per GPU, at GPT-2's size; the estimate uses the measured step

Every process has the same number of windows, so the batch grows with the number of processes (weak scaling). A step
then takes as long as in one process, plus the exchange of gradients. In a ring (Patarasuk and Yuan 2009, "Bandwidth
Optimal All-reduce Algorithms for Clusters of Workstations"), each of N processes sends per step

    2 (N - 1) / N * 4 bytes * parameters

The estimate divides that by the speed of the slowest link. It gives two efficiencies: one if the exchange waits for the
backward pass, and one if the backward pass, two thirds of a step, hides as much of the exchange as it can.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402
import v3  # noqa: E402
from benchmarks.steps import random_tokens, run_steps  # noqa: E402
from benchmarks.tables import keep, machine, table  # noqa: E402
from harness import distributed  # noqa: E402

VOCAB_SIZE = {"cpu": 4096, "cuda": 50304}
SHAPE = {  # constants of v3 that are not its defaults
    "cpu": {"MICRO_BATCH_SIZE": 8},
    "cuda": {"N_LAYER": 12, "N_HEAD": 12, "N_EMBD": 768, "BLOCK_SIZE": 1024, "MICRO_BATCH_SIZE": 32},
}
WARM_UP, STEPS = 5, 20
# GPT-2's size on an H100, if no GPU was measured: the step is estimated at 40% of the dense bf16 rate in NVIDIA's data
# sheet, 989 TFLOP/s, for 32 windows of 1,024 tokens and 0.80 GFLOPs per token.
GPU_PARAMETERS, GPU_TOKENS, GPU_STEP = 124_000_000, 32 * 1024, 32 * 1024 * 0.80e9 / (0.4 * 989e12)
LINKS = {  # bytes per second that a process can send, 80% of the makers' figures, and the number of processes
    "8 GPUs of one machine, NVLink (450 GB/s)": (8, 0.8 * 450e9),
    "8 machines of 8 GPUs, 400 Gbit/s for each GPU": (64, 0.8 * 50e9),
    "8 machines of 1 GPU, 100 Gbit/s": (8, 0.8 * 12.5e9),
    "8 machines of 1 GPU, 10 Gbit/s": (8, 0.8 * 1.25e9),
}


def work():
    """The work of one process: time its steps and the exchange alone. The first process prints the seconds."""
    kind = torch.device(v3.DEVICE).type
    harness.set_constants(vars(v3), [f"{name}={value}" for name, value in SHAPE[kind].items()])
    v3.BATCH_SIZE = v3.MICRO_BATCH_SIZE * int(os.environ["WORLD_SIZE"])
    with distributed.processes(vars(v3)):
        torch.manual_seed(v3.SEED)
        model = v3.LanguageModel(VOCAB_SIZE[kind]).to(v3.DEVICE)
        gradients = torch.zeros(sum(p.numel() for p in model.parameters()), device=v3.DEVICE)
        ends, steps, exchanges = [], [], []

        def on_step(run):
            harness.all_reduce(torch.zeros(1))
            if ends:
                steps.append(time.perf_counter() - ends[-1])
            if harness.world_size() > 1:
                start = time.perf_counter()
                dist.all_reduce(gradients)
                harness.all_reduce(torch.zeros(1))  # on a GPU it returns when the exchange is done
                exchanges.append(time.perf_counter() - start)
            harness.barrier()
            ends.append(time.perf_counter())
            return len(steps) < WARM_UP + STEPS

        run_steps(v3, model, random_tokens(v3, VOCAB_SIZE[kind]), on_step)
        print(json.dumps({
            "device": v3.DEVICE, "threads": torch.get_num_threads(), "parameters": gradients.numel(),
            "tokens": v3.MICRO_BATCH_SIZE * v3.BLOCK_SIZE, "steps": steps[WARM_UP:], "exchanges": exchanges[WARM_UP:],
        }), flush=True)  # fmt: skip


def measure(n, device):
    """The results of `work` in `n` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__]
    done = subprocess.run([*command, "--work", device], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise ValueError(f"{n} processes failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def volume(n, parameters):
    """How many bytes each of `n` processes sends to average the gradients of all."""
    return 2 * (n - 1) / n * 4 * parameters


def measured_table(runs):
    alone = median(runs[0][1]["steps"])
    rows = []
    for n, run in runs:
        step = median(run["steps"])
        exchange = median(run["exchanges"]) if run["exchanges"] else 0.0
        rate = f"{volume(n, run['parameters']) / exchange / 1e9:.2f}" if exchange else "–"
        rows.append([n, f"{1000 * step:.0f}", f"{n * run['tokens'] / step:,.0f}", f"{alone / step:.0%}",
                     f"{volume(n, run['parameters']) / 1e6:.1f}", f"{1000 * exchange:.0f}", rate,
                     f"{alone / (alone + exchange):.0%}"])  # fmt: skip
    return table(["processes", "ms per step", "tokens/s", "efficiency", "MB sent a step", "ms for these alone", "GB/s",
                  "efficiency expected of them"], rows)  # fmt: skip


def estimate_table(parameters, tokens, step):
    rows = [["1 GPU", f"{1000 * step:.0f}", "0", f"{tokens / step:,.0f}", "100%", "100%"]]
    for name, (n, rate) in LINKS.items():
        exchange = volume(n, parameters) / rate
        waiting, hidden = step + exchange, step + max(0.0, exchange - 2 / 3 * step)
        rows.append([name, f"{1000 * step:.0f}", f"{1000 * exchange:.0f}",
                     f"{n * tokens / waiting:,.0f} to {n * tokens / hidden:,.0f}", f"{step / waiting:.0%}",
                     f"{step / hidden:.0%}"])  # fmt: skip
    return table(["estimate", "ms of a step alone", "ms of exchange", "tokens/s", "efficiency, waiting",
                  "efficiency, overlapping"], rows)  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description="Training by several processes.")
    parser.add_argument("--gpu", action="store_true", help="one process for each GPU, at GPT-2's size")
    parser.add_argument("--work", metavar="DEVICE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        v3.DEVICE = args.work
        return work()
    if args.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu needs a GPU that torch can use, but there is none; leave it out")
    device = "cuda" if args.gpu else "cpu"
    most = torch.cuda.device_count() if args.gpu else 2
    runs = [(n, measure(n, device)) for n in sorted({1, most})]
    run = runs[0][1]
    if args.gpu:
        size, source = (run["parameters"], run["tokens"], median(run["steps"])), "The step of one GPU is measured."
    else:
        size = (GPU_PARAMETERS, GPU_TOKENS, GPU_STEP)
        source = "No GPU was measured: a step is taken to reach 40% of an H100's 989 TFLOP/s."
    unit = "a GPU" if args.gpu else "one thread"
    text = (
        f"{measured_table(runs)}\nv3 with {run['parameters']:,} parameters; each process computes {run['tokens']:,} "
        f"tokens a step on {unit}. Medians of {STEPS} steps.\nMachine: {machine()}.\n\n{estimate_table(*size)}\n"
        f"GPT-2's size, {size[0]:,} parameters, {size[1]:,} tokens a step on each GPU, gradients in float32. {source} "
        "Links at 80% of the makers' figures.\n"
    )
    print(text, end="")
    keep("scaling_gpu" if args.gpu else "scaling", {"machine": machine(), "runs": runs}, text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("scaling.py: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit(f"scaling.py: {error}")
