"""Child processes that are forked from one that has imported torch and the rungs: a start costs no imports.

`Forked` takes the place of subprocess.Popen where a program starts rungs.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, RUNGS

PRELOAD = ["forked", "torch._dynamo", "results.experiments", *RUNGS]


def server():
    """What forks the children, started when it is first needed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    changed = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    multiprocessing.forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name)
        os.environ.update({name: value} if value is not None else {})
    return context


def run_script(words, paths):
    """In a child: what `python words` does in the repository's folder. `paths` are the files for standard output and
    error, if they are not those of the parent."""
    for number, path in enumerate(paths, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    sys.argv = list(map(str, words))
    runpy.run_path(sys.argv[0], run_name="__main__")


class Forked:
    """A script in a process of its own, with what the runner uses of subprocess.Popen. `words` begin with the
    interpreter, `output` is an open file or DEVNULL; without, what is printed appears here when the process has ended
    (fork: at once)."""

    def __init__(self, context, words, output=None):
        self.shown = []  # (number of a stream of this process, file with what is to be written there)
        paths = [os.devnull if output == subprocess.DEVNULL else output.name] * 2 if output else []
        if not paths and context.get_start_method() != "fork":
            for number in (1, 2):
                handle, path = tempfile.mkstemp()
                os.close(handle)
                self.shown.append((number, path))
            paths = [path for _, path in self.shown]
        self.process = context.Process(target=run_script, args=(words[1:], paths))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def wait(self):
        self.process.join()
        for number, path in self.shown:
            os.write(number, Path(path).read_bytes())
            os.unlink(path)
        self.shown = []
        return self.returncode

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()


def call_in_group(function, arguments, folder, output):
    """In a child: `function` in a process that leads a group of its own, as if a shell had started it in `folder`. What
    it prints goes to `output`.out and .err."""
    os.setpgid(0, 0)
    for number, path in ((1, f"{output}.out"), (2, f"{output}.err")):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(folder)
    function(*arguments)


@contextlib.contextmanager
def process_group(function, arguments, folder, output):
    """A process that runs call_in_group; all of its group are killed at the end."""
    process = server().Process(target=call_in_group, args=(function, arguments, folder, output))
    process.start()
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
