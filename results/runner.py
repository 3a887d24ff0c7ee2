"""Starts rungs in processes of their own, and ends them with this one."""

import contextlib
import os
import signal
import subprocess
import sys

from harness.errors import UserError
from results.edits import edited
from results.plan import ROOT

RUNNING, SIGNALS = [], []  # the rung that this process has started; the signals to stop that it has got


class Stopped(KeyboardInterrupt):
    """SIGTERM. Unlike Ctrl-C it reaches this process only, not those that it has started."""


def raise_stopped(*_):
    """A handler of SIGTERM."""
    raise Stopped


def stop_this_worker(signum, _frame):
    """A handler of both signals in a worker: end the rung that runs and begin no other."""
    SIGNALS.append(signum)
    for process in RUNNING if signum == signal.SIGTERM else ():  # Ctrl-C reaches it by itself
        process.terminate()


def init_worker():
    """What a process that makes one run after the other does first."""
    signal.signal(signal.SIGINT, stop_this_worker)
    signal.signal(signal.SIGTERM, stop_this_worker)


def command(run, folder, constants):
    """The words that start a run, whose results go to `folder`/run. Writes an edited rung to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    script = ROOT / f"{run.rung}.py"
    if run.edits:
        text = edited(script.read_text(encoding="utf-8"), run.edits)
        script = folder / script.name
        script.write_text(text, encoding="utf-8")
    arguments = [f"{name}={value}" for name, value in constants.items()]
    out = os.path.relpath(folder / "run", ROOT)  # it is kept in the summary, where the place of this machine is no use
    return [sys.executable, str(script), *arguments, f"OUT_DIR={out}", "RESUME=True"]


def launch(words, jobs=1, output=None):
    """Start a process in the repository's folder, with its share of the cores if it is one of several `jobs`. What it
    prints goes to the file `output`, or to the screen."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **threads}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)


def train(run, folder, constants, jobs=1):
    """Train in a process of its own, from the last checkpoint if there is one. Raises ValueError if it fails. If this
    process is stopped, the rung finishes its step and saves first."""
    words = command(run, folder, constants)
    with contextlib.ExitStack() as stack:
        screen = None
        if jobs > 1:  # the lines of several runs would be mixed up
            screen = stack.enter_context(open(folder / "screen.txt", "w", encoding="utf-8"))
        process = launch(words, jobs, screen)
        RUNNING[:] = [process]
        try:
            process.wait()
        except KeyboardInterrupt as reason:
            if isinstance(reason, Stopped):
                process.terminate()
            process.wait()
            raise
    if process.returncode:
        place = f"in {folder / 'screen.txt'}" if screen else "above"
        raise UserError(f"the run in {folder} has ended with exit code {process.returncode}; its message is {place}")
