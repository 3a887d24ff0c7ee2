"""The frame around every run: constants, processes, files, checkpoints, reports. No lesson is about it.

Its rule: nothing in here affects a loss beyond rounding. Whatever determines a loss is in the rungs.

    if __name__ == "__main__":
        harness.start(globals())             # NAME=value, --help, errors in one line; then main()

    with harness.Run(globals()) as run:      # checks the constants, locks OUT_DIR
        run.begin(model, tokens)             # prints what is trained
        state = run.resume(model, optimizer) # with RESUME=True from the last checkpoint
        if run.evaluation_due(step): ...
        run.log(step, metrics)               # an evaluation: on the screen, in log.jsonl, checkpoint
        run.step(loss, grad_norm)            # a step: in steps.csv; ends after Ctrl-C or a loss that is not finite
        run.load_best(model)                 # training is over: the weights of the best evaluation
        summary = run.finish(sample)         # summary.json, loss.png, sample.txt, and the last lines on the screen

    model, tokenizer = harness.load("runs/v3")  # what a run of any rung has trained

A rung is passed as its `globals()`, so its constants are read when they are used.
"""

import importlib
import os
import sys


def hidden_modules(folder):
    """Paths of the files and packages in `folder`, the folder of the program or notebook, that hide modules of Python
    or of this project."""
    project = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    names = set(sys.stdlib_module_names)
    if os.path.realpath(folder) != os.path.realpath(project):
        names |= {"bpe", "bpe_tokenizer", "data", "harness", "kernels", "look", "results"}
    there = [os.path.join(folder, name) for name in sorted(os.listdir(folder or "."))]
    found = [path for path in there if path.endswith(".py") or os.path.isfile(os.path.join(path, "__init__.py"))]
    return [path for path in found if os.path.basename(path).removesuffix(".py") in names]


if sys.path[0] == os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", ""))) or not sys.path[0]:
    for _path in hidden_modules(sys.path[0]):
        print(f"{_path} hides a module of the same name that is needed here; rename it", file=sys.stderr)

from harness import cli  # noqa: E402 - it imports modules that may be hidden

cli.answer_help()  # before anything loads torch, which takes seconds

NAMES = {  # what rungs, notebooks and tools use, by file; a file is imported when one of its names is first used
    "checks": ("check_ids", "check_prompt", "check_tokens"),
    "cli": ("check_constants", "constants", "override", "say", "set_constants", "start"),
    "distributed": ("all_reduce", "autocast", "barrier", "divide_work", "peak_memory_mb", "rank", "resolve_dtype",
                    "seed", "share_batches", "sync_gradients", "to_device", "world_size"),
    "errors": ("FileError", "InputError", "MissingFileError", "UserError", "too_few_tokens"),
    "files": ("atomic_write", "atomic_writes", "file_lock"),
    "models": ("load",),
    "report": ("draw_curves",),
    "resume": ("RUN_FILES", "same_training"),
    "run": ("Run",),
    "samples": ("continue_prompt", "text_of"),
}  # fmt: skip


def __getattr__(name):
    for file, names in NAMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"harness.{file}"), name)
            if file == "checks":  # every forward pass calls them
                globals()[name] = value
            return value
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
