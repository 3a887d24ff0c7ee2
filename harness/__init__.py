"""The frame around every run: constants, processes, files, checkpoints, reports. No lesson is about it.

Its rule: nothing in here changes a loss, except by rounding. What decides a loss is in the rungs.

    if __name__ == "__main__":
        harness.start(globals())             # NAME=value, --help, errors in one line; then main()

    with harness.Run(globals()) as run:      # checks the constants, locks OUT_DIR
        run.begin(model, tokens)             # says what is trained
        state = run.resume(model, optimizer) # with RESUME=True from the last checkpoint
        if run.evaluation_due(step): ...
        run.log(step, metrics)               # an evaluation: screen, log.jsonl, checkpoint
        run.step(loss, grad_norm)            # a step: steps.csv; Ctrl-C saves and ends; stops if the loss is not finite
        run.load_best(model)                 # training is over: the weights of the best evaluation
        summary = run.finish(sample)         # summary.json, loss.png, sample.txt, and the last lines on the screen

    model, tokenizer = harness.load("runs/v3")  # what a run of any rung has trained

A rung is passed as its `globals()`, so its constants are read when they are used.
"""

import importlib
import os
import sys


def hidden_modules(folder):
    """The files and packages in `folder`, that of the program or notebook, that Python imports in place of its own
    modules or of this project's."""
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

from harness import cli  # noqa: E402 - it needs modules that may be hidden

cli.answer_help()  # before anything loads torch, which takes seconds

NAMES = {  # what rungs, notebooks and tools use, by file; each file is loaded when a name of it is first used
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
