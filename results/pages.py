"""Make the tables of README.md, results/README.md and docs/course.md, and the pictures in results/, from the
committed results.

    python results/pages.py --collect   first copy the finished runs from runs/ to results/runs/
    python results/pages.py             write tables and pictures
    python results/pages.py --check     exit with code 1 if a table is not what the results say

Comparisons come from results/experiments/ (one to three seeds; made by experiments.py), details of a single run from
results/runs/, timings from results/benchmarks/. A page marks the place of a table with <!-- name --> and
<!-- /name -->.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.cli import say  # noqa: E402
from harness.errors import FileError, MissingFileError, UserError  # noqa: E402
from harness.identity import code_hash  # noqa: E402
from results import checks, pictures, store  # noqa: E402
from results.plan import EXPERIMENTS, V4, Run  # noqa: E402
from results.tables import TABLES  # noqa: E402

PAGES = ("README.md", "results/README.md", "docs/course.md")
RUNS = ("v0", "v1", "v1_1", "v2", "v3", "v3_1", f"{V4}/alibi", f"{V4}/rope")  # folders below runs/
KEPT = ("summary.json", "log.jsonl", "steps.csv", "sample.txt", "*.png")  # of a run; the weights are not committed


def collect():
    """Copy summaries, logs, samples and pictures of the runs in runs/ to results/runs/. Before anything is copied,
    raises OSError and ValueError if they do not belong together or were not made with the rungs' default constants."""
    for run, summary in read_summaries(ROOT / "runs").items():
        check_defaults(run, summary)
    for run in (*RUNS, V4):  # v4's own folder has the picture of the comparison
        for pattern in KEPT:
            for path in (ROOT / "runs" / run).glob(pattern):
                target = ROOT / "results" / "runs" / run / path.name
                store.make_folder(target.parent)
                try:
                    shutil.copyfile(path, target)
                except OSError as error:
                    raise FileError(f"cannot copy {path} to {target} ({error.strerror}); make room, or make both "
                                    "readable and writable") from None  # fmt: skip


def check_defaults(run, summary):
    """Raises ValueError if the run of that name was made with constants or code other than its rung has now."""
    rung, _, position = run.partition("/")
    planned = Run(rung, rung, {"POSITION": position} if position else {})
    wanted = checks.values(planned, planned.constants)
    differ = checks.differing_constants(planned, {"summary": summary}, wanted)
    if summary["rung"] != rung:
        differ.append(f"it is a run of {summary['rung']}.py")
    code = code_hash(checks.sources(planned)[0])
    if summary.get("code_sha256", code) != code:
        differ.append(f"the code of {rung}.py was different")
    if differ:
        raise UserError(f"runs/{run} is not what {rung}.py makes by default ({'; '.join(differ)}); make it again with "
                        f"python {rung}.py")  # fmt: skip


def read_summaries(folder):
    """{run: its summary} for RUNS in `folder`. Raises FileNotFoundError if a run has none, ValueError if the runs were
    trained on different texts."""
    for run in RUNS:
        if not (folder / run / "summary.json").exists():
            raise MissingFileError(f"{folder.relative_to(ROOT)}/{run} has no finished run; make it with "
                                   f"python {run.partition('/')[0]}.py")  # fmt: skip
    summaries = {run: store.read_json(folder / run / "summary.json") for run in RUNS}
    for run, summary in summaries.items():
        if not isinstance(summary, dict) or not {"rung", "dataset", "hyperparameters"} <= summary.keys():
            raise UserError(f"{folder.relative_to(ROOT)}/{run}/summary.json is damaged; make the run again with "
                            f"python {run.partition('/')[0]}.py")  # fmt: skip
    datasets = {summary["dataset"] for summary in summaries.values()}
    if len(datasets) > 1:
        raise UserError(f"the runs are not comparable: they trained on {', '.join(sorted(datasets))}; train all of "
                        "them on one text")  # fmt: skip
    for vocabulary in {summary.get("tokenizer") for summary in summaries.values()}:
        hashes = {run: summary["tokens_sha256"] for run, summary in summaries.items()
                  if summary.get("tokens_sha256") and summary["tokenizer"] == vocabulary}  # fmt: skip
        if len(set(hashes.values())) > 1:
            raise UserError("the runs are not comparable: they trained on different texts with the same name "
                            f"({', '.join(f'{run}: {text}' for run, text in hashes.items())}); train all of them on "
                            "one text")  # fmt: skip
    return summaries


def write_tables(check):
    """Write all tables into the pages, or, with `check`, change nothing. Returns whether they were up to date. Raises
    ValueError if a page has a place for an unknown table, or if no page has a place for a table."""
    current, used = True, set()
    for page in PAGES:
        text = new = store.read_text(ROOT / page)
        for name in re.findall(r"<!-- (\w+) -->\n", text):
            if name not in TABLES:
                raise UserError(f"{page} has a place for an unknown table, {name}; remove it, or add the table to "
                                "results/tables.py")  # fmt: skip
            place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)
            content = f"{TABLES[name]().strip()}\n"
            new = place.sub(lambda _, content=content: content, new)
            used.add(name)
        if new != text:
            current = False
            if not check:
                store.write_text(ROOT / page, new)
    if unused := TABLES.keys() - used:
        raise UserError(f"no page has a place for {', '.join(sorted(unused))}: <!-- name --> ... <!-- /name -->")
    return current


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make tables and pictures from the committed results.")
    parser.add_argument("--collect", action="store_true", help="first copy the finished runs from runs/")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not current")
    args = parser.parse_args(argv)
    if args.collect and args.check:
        raise UserError("--check changes nothing, but --collect copies files; give only one of them")
    store.LEFT_OUT.clear()
    if args.collect:
        collect()
    for name in EXPERIMENTS:
        store.say_unknown(name)
    current = write_tables(args.check)
    if not args.check:
        pictures.draw()
    say("the tables are current" if current else "a table is not current" if args.check else "the tables are written")
    return 1 if args.check and not current else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"pages.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
