"""Signals that end a job, and what a program does when one comes. Loads no torch."""

import contextlib
import signal
import threading

# Those that a terminal or a scheduler sends. Windows has SIGINT, SIGTERM and SIGBREAK.
_NAMES = (
    "SIGINT",  # Ctrl-C; the stop button of a notebook; LSF's bkill, before SIGTERM
    "SIGTERM",  # kill, torchrun, Slurm and other schedulers, docker stop, a computer that shuts down
    "SIGHUP",  # a terminal that is closed, an ssh connection that ends
    "SIGQUIT",  # Ctrl-\
    "SIGXCPU",  # a limit of CPU seconds: ulimit -t, Grid Engine, LSF
    "SIGUSR1",  # Slurm with --signal=USR1, Grid Engine with -notify
    "SIGUSR2",  # LSF before its time limit, Grid Engine with -notify
    "SIGBREAK",  # Ctrl-Break, a window that is closed, a session that ends
)
ENDING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
KEYBOARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGQUIT", "SIGBREAK") if hasattr(signal, name))
TWICE = 0.5  # seconds within which one signal may come twice: torchrun forwards what a scheduler sends to all


class Stopped(KeyboardInterrupt):
    """A signal ends the program. `number`: which one."""

    def __init__(self, number):
        super().__init__(f"signal {number}")
        self.number = number


def raise_stopped(number, frame):
    """A handler that ends the program at once. What comes later, such as the same signal from another sender, does not
    disturb the ending."""
    catch(lambda number, frame: None)
    raise Stopped(number)


def catch(receive):
    """From now on each of these signals calls `receive(number, frame)`. One that is ignored stays ignored: nohup does
    that with SIGHUP, a shell with SIGINT in the background. Returns a context, at whose end (or close()) all is as
    before. Only the main thread receives signals: in others nothing changes."""
    with contextlib.ExitStack() as before:
        for number in ENDING if threading.current_thread() is threading.main_thread() else ():
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # None: it is not Python's, and could not be put back
                before.callback(signal.signal, number, handler)
                signal.signal(number, receive)
        return before.pop_all()


@contextlib.contextmanager
def uninterrupted():
    """Within, these signals wait; the first of them takes effect at its end."""
    came = []
    try:
        with catch(lambda number, frame: came.append(number)):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)
