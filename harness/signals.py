"""Signals that end a job, and what a program does when one arrives. Does not load torch."""

import contextlib
import signal
import threading

# The signals that terminals and schedulers send. Windows has SIGINT, SIGTERM and SIGBREAK.
_NAMES = (
    "SIGINT",  # Ctrl-C; the stop button of a notebook; LSF's bkill, before SIGTERM
    "SIGTERM",  # kill, torchrun, Slurm and other schedulers, docker stop, shutdown of the computer
    "SIGHUP",  # a terminal is closed, an ssh connection ends
    "SIGQUIT",  # Ctrl-\
    "SIGXCPU",  # a limit on CPU seconds: ulimit -t, Grid Engine, LSF
    "SIGUSR1",  # Slurm with --signal=USR1, Grid Engine with -notify
    "SIGUSR2",  # LSF before its time limit, Grid Engine with -notify
    "SIGBREAK",  # Ctrl-Break, a window is closed, a session ends
)
ENDING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
KEYBOARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGQUIT", "SIGBREAK") if hasattr(signal, name))
TWICE = 0.5  # seconds: a signal may arrive twice, once from the scheduler and once forwarded by torchrun


class Stopped(KeyboardInterrupt):
    """A signal ends the program. `number`: the number of the signal."""

    def __init__(self, number):
        super().__init__(f"signal {number}")
        self.number = number


def raise_stopped(number, frame):
    """A signal handler that ends the program at once. Later signals, such as the same one from another sender, are
    ignored while it ends."""
    catch(lambda number, frame: None)
    raise Stopped(number)


def catch(receive):
    """From now on, each signal that ends a job calls `receive(number, frame)`. A signal that is ignored stays ignored,
    such as SIGHUP under nohup, or SIGINT in the background of a shell. Returns a context; its end (or close()) restores
    the old handlers. Only the main thread can set handlers: in other threads nothing changes."""
    with contextlib.ExitStack() as before:
        for number in ENDING if threading.current_thread() is threading.main_thread() else ():
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # None: not a Python handler, so it could not be restored
                before.callback(signal.signal, number, handler)
                signal.signal(number, receive)
        return before.pop_all()


@contextlib.contextmanager
def uninterrupted():
    """Context in which these signals wait; the first one takes effect at its end."""
    came = []
    try:
        with catch(lambda number, frame: came.append(number)):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)
