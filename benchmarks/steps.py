"""The training steps of a rung, made by the rung's own loop and counted by a benchmark."""

import contextlib
import sys
import tempfile
import time

import torch

import harness
import kernels
from data import Tokens


class StepBehind:
    """Keeps a program one step ahead of a GPU: it never waits for the step that it has just queued, only for the one
    before. (Reading a number of that earlier step would wait for both, since a copy is queued behind all work.)"""

    def __init__(self, device):
        self.on_gpu, self.before = torch.device(device).type == "cuda", None

    def wait(self):
        """Call it after each step."""
        if self.on_gpu:
            before, self.before = self.before, torch.cuda.Event()
            self.before.record()
            if before is not None:
                before.synchronize()


class Steps(harness.Run):
    """A run without evaluations and files. After each step it calls `on_step(run)`; run.seconds is the time of all
    steps so far; training ends when that returns False."""

    def __init__(self, rung, on_step):
        super().__init__(vars(rung))
        self.on_step, self.step_behind = on_step, StepBehind(self.device)

    def resume(self, model, *optimizers):
        self.step_began = time.perf_counter()
        return self.state

    def evaluation_due(self, step):
        return False

    def step(self, loss, grad_norm):
        self.step_behind.wait()
        self.state.step += 1
        now = time.perf_counter()
        self.seconds, self.step_began = self.seconds + now - self.step_began, now
        if not self.on_step(self):
            self.rung["MAX_STEPS"] = self.state.step  # ends the rung's loop


def run_steps(rung, model, tokens, on_step):
    """Train the `model` of a rung with its own `train` on `tokens`, a tensor of ids, until `on_step` returns False."""
    kernels.keep_freed_memory()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),
        harness.override(vars(rung), OUT_DIR=folder, MAX_STEPS=2**31 - 1),
        Steps(rung, on_step) as run,
    ):
        rung.train(model, {"train": Tokens(tokens, len(tokens), len(tokens), "random", "none")}, run)


def random_tokens(rung, vocab_size):
    """Enough random ids for a few different batches, (n,)."""
    random = torch.Generator().manual_seed(rung.SEED)
    n = (4 * rung.BATCH_SIZE + 1) * rung.BLOCK_SIZE + 1
    return torch.randint(vocab_size, (n,), generator=random).to(torch.uint16)
