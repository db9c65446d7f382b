"""SIGUSR1: a rank says where it is and goes on.

The Python stack of every thread is written by the signal handler itself, in native code, so it comes whatever the process is stuck in, also where
native code has kept the interpreter's lock. Then the process's Positions are said: by a thread that the signal wakes, since the main thread may
wait in native code for ever. A second signal that comes while the first is being answered may get the second part alone. A process that hears
SIGUSR1 in a way of its own keeps it.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

Say = Callable[[], str]


class Listener:
    """The handler of SIGUSR1 in this process. `fd`: where it writes · `says`: what it asks for a line, '' for none."""

    def __init__(self, fd: int):
        self.fd, self.says, self.pid = fd, list[Say](), os.getpid()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self.threaded = before == -1
        if self.threaded:
            threading.Thread(target=self._listen, name="lf SIGUSR1", daemon=True).start()
            os.register_at_fork(after_in_child=self._forget)
        else:  # an event loop has it: then the main thread says it, when it comes back to Python
            signal.set_wakeup_fd(before)
        self._excepthook, sys.excepthook = sys.excepthook, self._uncaught
        atexit.register(self._end)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.threaded:
            self.say()

    def say(self) -> None:
        """Writes the lines. A forked child has none: what was told is told of its parent."""
        if os.getpid() == self.pid:
            for line in filter(None, (say() for say in self.says)):
                with contextlib.suppress(OSError):
                    os.write(self.fd, f"lf: {line}\n".encode())

    def _listen(self) -> None:
        while got := os.read(self._woken, 512):
            if signal.SIGUSR1 in got:
                self.say()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._excepthook(kind, error, trace)
        self.say()

    def _end(self) -> None:  # Python gives signals back their defaults as it ends: this one would kill a process that has ended well
        if signal.getsignal(signal.SIGUSR1) is self:
            faulthandler.unregister(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _forget(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # else a signal to the child would wake the parent
            if (now := signal.set_wakeup_fd(-1)) != self._wake:
                signal.set_wakeup_fd(now)


def listen(say: Say | None = None, fd: int | None = None) -> Listener | None:
    """On SIGUSR1 this process writes its stacks and what `say` returns to `fd` (stderr without one); after an uncaught exception it writes the
    latter. A second call adds its `say` to the first.

    None where nothing is done: SIGUSR1 is somebody else's already, or this is the first call and not of the main thread.
    """
    listener = signal.getsignal(signal.SIGUSR1)
    if not isinstance(listener, Listener) or listener.pid != os.getpid():
        free = isinstance(listener, Listener) or listener in (signal.SIG_DFL, signal.SIG_IGN)
        if not free or threading.current_thread() is not threading.main_thread():
            return None
        listener = Listener(2 if fd is None else fd)
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, listener)
        faulthandler.register(signal.SIGUSR1, file=listener.fd, all_threads=True, chain=True)
    if say is not None:
        listener.says.append(say)
    return listener
