"""How long a rung takes to answer --help and to make its first step, with nothing compiled yet and later.

    python benchmarks/startup.py    some minutes; the results go to results/benchmarks/

All times count from the start of the process, on the tokens in data/. "First" means with an empty cache of compiled
code, as after installation; v0 to v2 compile nothing. The best of three repetitions counts.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import keep, machine, table  # noqa: E402

RUNGS = ("v0", "v1", "v1_1", "v2", "v3", "v3_1", "v4_alibi_rope")
REPETITIONS = 3


def seconds(*command):
    """The seconds of a whole command that ends on its own."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_to_first_step(rung, cache):
    """The seconds until steps.csv has its first row. `cache`: the folder of compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, f"{rung}.py", f"OUT_DIR={folder}/run"], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )  # fmt: skip
        try:
            while process.poll() is None:
                for path in Path(folder).rglob("steps.csv"):
                    if path.read_text().count("\n") > 1:
                        return time.perf_counter() - start
                time.sleep(0.01)
            raise ValueError(process.stderr.read().strip())
        finally:
            process.kill()
            process.wait()


def report(results):
    """The results as Markdown."""
    rows = [[name, *(f"{x:.1f}" for x in (one["help"], one["first"], one["later"]))]
            for name, one in results["seconds"].items()]  # fmt: skip
    head = ["seconds", "--help", "first step, nothing compiled", "first step, later"]
    return (f"{table(head, rows)}\nOf them `import torch` takes {results['import_torch']:.1f} s. Best of "
            f"{results['repetitions']}, the first alone.\nMachine: {results['machine']}.\n")  # fmt: skip


def main():
    results = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "repetitions": REPETITIONS, "seconds": {},
               "import_torch": min(seconds("-c", "import torch") for _ in range(REPETITIONS))}  # fmt: skip
    for rung in RUNGS:
        print(rung, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as cache:
            results["seconds"][rung] = {
                "help": min(seconds(f"{rung}.py", "--help") for _ in range(REPETITIONS)),
                "first": seconds_to_first_step(rung, cache),
                "later": min(seconds_to_first_step(rung, cache) for _ in range(REPETITIONS)),
            }
    text = report(results)
    print(text, end="")
    keep("startup", results, text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("startup.py: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"startup.py: {error}")
