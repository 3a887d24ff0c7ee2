"""Python programs in processes of their own, forked from one that has imported the slow libraries already: a start
takes milliseconds instead of seconds. As for a program that is started anew, no module of this project is imported.

    done = forks.run(["data/prepare.py", "--sample"], cwd=folder)    # as subprocess.run, with the output as text
    child = forks.start(["-c", code], cwd=folder)                    # child.pid, child.out, child.finish()
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
import forks
forks.serve(sys.argv[2:])
"""


# ----------------------------------------------------------------------------------------------------------
# In the process that forks
# ----------------------------------------------------------------------------------------------------------


def serve(libraries):
    """Import the libraries, then answer requests on stdin, a line of JSON each: {"args": ...} forks a child and tells
    its process id, {"wait": id} tells its exit code."""
    import importlib

    del sys.path[:2]  # neither the tests nor the current folder
    for name in libraries:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            os._exit(run_program(**request))


def run_program(args, cwd, env, output, closed_stdout):
    """What `python *args` does in the folder `cwd`. Returns its exit code."""
    import atexit
    import runpy
    import signal
    import traceback

    atexit._clear()  # what the libraries do at their end is for the server
    if closed_stdout:  # a pipe that nobody reads
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
    for number, ending in ((1, ".out"), (2, ".err")):
        if number == 2 or not closed_stdout:
            os.dup2(os.open(output + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    code = 0
    try:
        if args[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *args[2:]], [""]
            exec(compile(args[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[:0] = list(args), [str(Path(args[0]).resolve().parent)]
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    atexit._run_exitfuncs()
    try:
        sys.stdout and sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored while flushing sys.stdout: {error!r}", file=sys.stderr)
        code = code or 120
    return code


# ----------------------------------------------------------------------------------------------------------
# In the process of the tests
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def server(*libraries):
    """What forks; it ends with this process, which closes its stdin."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent), *libraries]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "ready\n"
    return process, tempfile.TemporaryDirectory(prefix="forks-"), itertools.count()


def _ask(process, request):
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


class Child:
    """A program that runs."""

    def __init__(self, process, request):
        self.process, self.output = process, request["output"]
        self.pid, self.code = _ask(process, request), None

    @property
    def out(self):
        return self._read(".out")

    @property
    def err(self):
        return self._read(".err")

    def _read(self, ending):
        path = Path(self.output + ending)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, text, seconds=60):
        """Return when the program has written `text` to stdout or stderr."""
        end = time.monotonic() + seconds
        while text not in self.out + self.err:
            assert time.monotonic() < end, f"{text!r} never came: {self.out}{self.err}"
            time.sleep(0.005)

    def finish(self):
        """Wait for the end: returncode, stdout and stderr, as subprocess.run gives them."""
        if self.code is None:
            self.code = _ask(self.process, {"wait": self.pid})
        return SimpleNamespace(returncode=self.code, stdout=self.out, stderr=self.err)


def start(args, cwd, env=None, libraries=("torch", "numpy", "tqdm"), closed_stdout=False):
    """Start `python *args` in the folder `cwd`, forked from a process that has imported `libraries`. `env`: its
    environment, by default that of this process. `closed_stdout`: nobody reads what it prints."""
    process, folder, numbers = server(*libraries)
    env = dict(os.environ if env is None else env) | {"OMP_NUM_THREADS": "1"}
    return Child(process, {"args": [str(arg) for arg in args], "cwd": str(cwd), "env": env,
                           "output": f"{folder.name}/{next(numbers)}", "closed_stdout": closed_stdout})  # fmt: skip


def run(args, cwd, **options):
    """The same, until it ends: returncode, stdout and stderr, as subprocess.run gives them."""
    return start(args, cwd, **options).finish()
