"""The clock of a run. Loads no torch."""

import threading
import time

TICK = 0.1  # seconds between two readings of the time
PAUSE = 2.0  # seconds without a reading that mean the process was suspended, unless it was computing


class Clock:
    """clock() gives the seconds in which the process could run. Time while it was suspended does not count: Ctrl-Z, a
    scheduler or a container that freezes the process, a laptop that sleeps.

    Inside the context, a thread reads the time every TICK. If a reading comes far too late, either the process was
    suspended, or a C function kept other threads waiting; the CPU time used in between tells which.
    """

    def __init__(self):
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.seconds, self.last = 0.0, (time.perf_counter(), time.process_time())
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self):
        while not self.closed.wait(TICK):
            self()

    def __call__(self):
        with self.lock:
            now = time.perf_counter(), time.process_time()
            passed, computed = (a - b for a, b in zip(now, self.last))
            suspended = passed > PAUSE and computed < passed / 4
            self.seconds += TICK if suspended else passed
            self.last = now
            return self.seconds

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.thread.join()
