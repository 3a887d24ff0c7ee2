"""Half an hour of v3, with an evaluation and a checkpoint every 100 steps: does its memory use stay constant?

    python benchmarks/soak.py               30 minutes; the results go to results/benchmarks/
    python benchmarks/soak.py --minutes 2   a first look; writes nothing
    python benchmarks/soak.py --rung v4_alibi_rope

Resident memory and open files of the run are read from /proc (Linux only). Between two evaluations a run keeps freed
memory, so its resident memory depends on where the C library happened to place blocks. After each evaluation it returns
freed memory, so the lowest value within some minutes shows how much the run holds. The first five minutes, or the first
sixth of a shorter run, are warm-up. The table shows the rest in five equal parts. Each has only a few evaluations, so
the test is that the mean grows by less than 2% from the first half of the rest to the second.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import keep, machine, table  # noqa: E402

LIMIT, INTERVAL = 0.02, 0.1  # the largest growth allowed; seconds between two readings


def watch(rung, minutes):
    """(a list of (seconds, resident MB, open files) of a run, how many evaluations it made)."""
    looks, page = [], os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory() as out:
        constants = ["MAX_STEPS=100000000", "EVAL_INTERVAL=100", "PATIENCE=1000000", f"OUT_DIR={out}"]
        run = subprocess.Popen([sys.executable, f"{rung}.py", *constants], cwd=ROOT, stdout=subprocess.DEVNULL)
        proc, start = Path(f"/proc/{run.pid}"), time.monotonic()
        try:
            while (seconds := time.monotonic() - start) < 60 * minutes:
                if run.poll() is not None:
                    raise ValueError(f"{rung}.py ended after {seconds:.0f} s with exit code {run.returncode}")
                resident = int((proc / "statm").read_text().split()[1]) * page / 1e6
                looks.append((seconds, resident, len(list((proc / "fd").iterdir()))))
                time.sleep(INTERVAL)
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait()
        if run.returncode != 128 + signal.SIGTERM:
            raise ValueError(f"{rung}.py ended with exit code {run.returncode} after SIGTERM")
        log = next(Path(out).rglob("log.jsonl")).read_text().splitlines()
    return looks, len(log)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Memory and open files of a long run.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rung", choices=("v3", "v3_1", "v4_alibi_rope"), default="v3")
    args = parser.parse_args(argv)
    looks, evaluations = watch(args.rung, args.minutes)
    warm = min(300, 10 * args.minutes)
    part = (60 * args.minutes - warm) / 5
    slices = [(warm + i * part, warm + (i + 1) * part) for i in range(5)]
    rows = []
    for a, b in [(0, warm), *slices]:
        resident, files = zip(*[look[1:] for look in looks if a <= look[0] < b])
        rows.append([f"{a / 60:.0f} to {b / 60:.0f}", f"{min(resident):,.0f}", f"{mean(resident):,.0f}",
                     f"{max(resident):,.0f}", max(files)])  # fmt: skip
    kept, middle = looks[::50], (warm + 60 * args.minutes) / 2
    halves = [[r for t, r, _ in kept if a <= t < b] for a, b in ((warm, middle), (middle, math.inf))]
    growth = mean(halves[1]) / mean(halves[0]) - 1
    head = ["minutes", "resident memory, MB: lowest", "mean", "highest", "open files (most)"]
    text = (f"{table(head, rows)}\n{args.rung}, {evaluations} evaluations and checkpoints. From the first half of the "
            f"time after warming up to the second, the mean changed by {growth:+.2%}.\n"
            f"Machine: {machine()}.\n")  # fmt: skip
    print(text, end="")
    if args.minutes >= 30:
        content = {"rung": args.rung, "evaluations": evaluations, "growth": growth, "looks": kept}
        keep("soak", content, text, indent=None)
    return int(growth > LIMIT)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("soak.py: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, StopIteration) as error:
        sys.exit(f"soak.py: {error}")
