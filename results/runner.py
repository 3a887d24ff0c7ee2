"""Starts each rung in its own process, and ends it with this one."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import harness
from harness import signals
from harness.errors import FileError, UserError
from harness.files import Locked, file_lock
from results import store
from results.edits import edited
from results.plan import HOW, ROOT

RUNNING, SIGNALS = [], []  # the rung that this process has started; the stop signals that it has received
# Ctrl-C reaches the rung anyway, and a second one would end it at once, so it is not passed on. Any other signal may
# have been sent only to this process, which passes it on as SIGTERM; a rung may receive that twice.


def stop_this_worker(number, _frame):
    """A signal handler in a worker: end the running rung and start no other."""
    SIGNALS.append(number)
    for process in RUNNING if number != signal.SIGINT else ():
        process.terminate()


def init_worker():
    """The start of a worker process, which makes one run after another."""
    signals.catch(stop_this_worker)


def begin(folder, output, made_of):
    """Note in `folder` what its run is made of, before the run begins or continues. If the folder holds a run that was
    made of something else (results in `output`), move that run aside, so that neither its results nor its checkpoint
    are mistaken for those of this one."""
    note, run = folder / "made_of.json", folder / "run"
    store.make_folder(folder)
    made_of = json.loads(json.dumps(made_of))
    before = store.read_json(note) if note.exists() else None
    differ = difference(before, made_of)
    if not differ and (output / "summary.json").exists():
        found = store.read_json(output / "summary.json").get("code_sha256")
        differ = ["its code was changed as it began"] if found != made_of["code_sha256"] else []
    if differ and run.exists():
        if output.exists():
            try:
                with file_lock(output / "lock"):
                    pass
            except Locked as error:
                raise UserError(f"process {error.holder} is training in {store.shown(output)}; wait for it, or stop "
                                "it") from None  # fmt: skip
        numbers = [int(path.suffix[1:]) for path in folder.glob("run.*") if path.suffix[1:].isdecimal()]
        aside = folder / f"run.{max(numbers, default=0) + 1}"
        try:
            run.rename(aside)
        except OSError as error:
            raise FileError(f"cannot move {run} aside ({error.strerror}); move it yourself") from None
        harness.say(f"{store.shown(run)} held another run ({'; '.join(differ)}); that is now in {aside.name}, and this "
                    "run starts from the beginning")  # fmt: skip
    if before != made_of:
        store.write_text(note, json.dumps(made_of, indent=1) + "\n")


def difference(before, now):
    """A list of the differences between two notes of what a run is made of; empty if they do not matter."""
    if not isinstance(before, dict) or not isinstance(before.get("constants"), dict):
        return ["there is no note of what it was made of"]
    then, here = before["constants"], now["constants"]
    differ = [f"{name} was {then.get(name, 'not set')} and is {here.get(name, 'not set')}"
              for name in sorted({*then, *here} - {*HOW}) if then.get(name) != here.get(name)]  # fmt: skip
    words = {"rung": "it is of another rung", "edits": "it has other edits", "text": "it read another text",
             "code_sha256": "the code of the rung was different"}  # fmt: skip
    return differ + [text for key, text in words.items() if before.get(key) != now[key]]


def command(run, folder, constants):
    """The command that starts a run with its results in `folder`/run, as a list. Writes an edited rung to `folder`."""
    store.make_folder(folder)
    script = ROOT / f"{run.rung}.py"
    if run.edits:
        text = edited(store.read_text(script), run.edits)
        script = folder / script.name
        store.write_text(script, text)
    arguments = [f"{name}={value}" for name, value in constants.items()]
    out = os.path.relpath(folder / "run", ROOT)  # relative, since the summary keeps it
    return [sys.executable, str(script), *arguments, f"OUT_DIR={out}", "RESUME=True"]


@contextlib.contextmanager
def rung_of(folder):
    """While it lasts, an import of a rung gives the edited copy that trained the model in `folder`, if an experiment
    trained it with edits; else nothing changes."""
    places = [place for place in Path(folder).resolve().parents[:2] if (place / "made_of.json").exists()]
    made_of = store.read_json(places[0] / "made_of.json") if places else {}
    if not made_of.get("edits"):
        yield
        return
    name = made_of["rung"]
    spec = importlib.util.spec_from_file_location(name, places[0] / f"{name}.py")
    module, before = importlib.util.module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def launch(words, jobs=1, output=None):
    """Start a process in the repository's folder, with its share of the cores if there are several `jobs`. Its output
    goes to the file `output`, or to the screen."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **threads}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)


def train(run, folder, constants, jobs=1):
    """Train in a separate process, from the last checkpoint if there is one. Raises ValueError if it fails. If this
    process is stopped, the rung first finishes its step and saves."""
    words = command(run, folder, constants)
    with contextlib.ExitStack() as stack:
        screen = None
        if jobs > 1:  # else the lines of several runs would mix
            screen = stack.enter_context(open(folder / "screen.txt", "w", encoding="utf-8"))
        RUNNING.clear()
        try:
            with signals.uninterrupted():
                process = launch(words, jobs, screen)
                RUNNING[:] = [process]
            process.wait()
        except signals.Stopped as reason:
            for process in RUNNING:
                if reason.number != signal.SIGINT:
                    process.terminate()
                process.wait()
            raise
    if process.returncode:
        place = f"in {folder / 'screen.txt'}" if screen else "above"
        raise UserError(f"the run in {folder} ended with exit code {process.returncode}; its message is {place}")
