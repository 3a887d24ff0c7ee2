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

from harness import cli

cli.answer_help()  # before anything loads torch, which takes seconds

NAMES = {  # what rungs, notebooks and tools use, by file; each file is loaded when a name of it is first used
    "cli": ("check_constants", "constants", "override", "say", "set_constants", "start"),
    "distributed": ("all_reduce", "autocast", "barrier", "divide_work", "peak_memory_mb", "rank", "resolve_dtype",
                    "seed", "share_batches", "sync_gradients", "to_device", "world_size"),
    "errors": ("FileError", "MissingFileError", "UserError", "too_few_tokens"),
    "files": ("atomic_write", "atomic_writes", "file_lock"),
    "models": ("continue_prompt", "load"),
    "report": ("draw_curves",),
    "resume": ("RUN_FILES", "same_training"),
    "run": ("Run",),
}  # fmt: skip


def __getattr__(name):
    for file, names in NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"harness.{file}"), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
