"""Make the tables of README.md and results/README.md, and the pictures in results/, from the committed results.

    python results/pages.py --collect   first copy the finished runs from runs/ to results/runs/
    python results/pages.py             write tables and pictures
    python results/pages.py --check     exit with code 1 if a table is not what the results say

What is compared comes from results/experiments/ (one to three seeds; experiments.py makes it), what is shown of a
single run from results/runs/, what is timed from results/benchmarks/. A page marks the place of a table with
<!-- name --> and <!-- /name -->.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.errors import MissingFileError, UserError  # noqa: E402
from results import pictures  # noqa: E402
from results.plan import V4  # noqa: E402
from results.store import write_text  # noqa: E402
from results.tables import TABLES  # noqa: E402

PAGES = ("README.md", "results/README.md")
RUNS = ("v0", "v1", "v1_1", "v2", "v3", "v3_1", f"{V4}/alibi", f"{V4}/rope")  # folders below runs/
KEPT = ("summary.json", "log.jsonl", "steps.csv", "sample.txt", "*.png")  # of a run; the weights are not committed


def collect():
    """Copy summaries, logs, samples and pictures of the runs in runs/ to results/runs/."""
    read_summaries(ROOT / "runs")  # nothing is copied if they do not belong together
    for run in (*RUNS, V4):  # v4's own folder has the picture of the comparison
        for pattern in KEPT:
            for path in (ROOT / "runs" / run).glob(pattern):
                target = ROOT / "results" / "runs" / run / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def read_summaries(folder):
    """{run: its summary} of RUNS in `folder`. Raises FileNotFoundError if one has none, ValueError if they were trained
    on different texts."""
    for run in RUNS:
        if not (folder / run / "summary.json").exists():
            raise MissingFileError(f"{folder.relative_to(ROOT)}/{run} has no finished run; "
                                   f"python {run.partition('/')[0]}.py makes it")  # fmt: skip
    summaries = {run: json.loads((folder / run / "summary.json").read_text(encoding="utf-8")) for run in RUNS}
    datasets = {summary["dataset"] for summary in summaries.values()}
    if len(datasets) > 1:
        raise UserError(f"the runs are not comparable: they trained on {', '.join(sorted(datasets))}")
    return summaries


def write_tables(check):
    """Write all tables into the pages, or with `check` change nothing. Returns whether they were up to date. Raises
    ValueError if a page marks a place for a table that does not exist, or no page has a place for one that does."""
    current, used = True, set()
    for page in PAGES:
        text = new = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"<!-- (\w+) -->\n", text):
            if name not in TABLES:
                raise UserError(f"{page} asks for a table that nothing makes: {name}")
            place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)
            content = f"{TABLES[name]().strip()}\n"
            new = place.sub(lambda _, content=content: content, new)
            used.add(name)
        if new != text:
            current = False
            if not check:
                write_text(ROOT / page, new)
    if unused := TABLES.keys() - used:
        raise UserError(f"no page has a place for {', '.join(sorted(unused))}: <!-- name --> ... <!-- /name -->")
    return current


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make tables and pictures from the committed results.")
    parser.add_argument("--collect", action="store_true", help="first copy the finished runs from runs/")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not current")
    args = parser.parse_args(argv)
    if args.collect:
        collect()
    current = write_tables(args.check)
    if not args.check:
        pictures.draw()
    print("the tables are current" if current else "a table is not current" if args.check else "the tables are written")
    return 1 if args.check and not current else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"pages.py: {error}")
