"""A run that is asked to end: SIGTERM (a cluster that takes the machine back) and SIGUSR2 (one that warns before it does, or a person).

Inside `asked()` these signals end nothing, they are noted; the loop agrees over all ranks on the last step and saves. A second signal ends the
process at once, as it would have without us.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
SAME = 1.0  # seconds: a launcher and its cluster may both pass one request on, so what comes within this is not a second one


@contextmanager
def asked() -> Iterator[Callable[[], int]]:
    """Yields fn() -> the number of the signal that has come, or 0. Only a main thread hears signals: elsewhere it stays 0."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    came: list[tuple[int, float]] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if came and now - came[0][1] >= SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        came.append((number, now))

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: came[0][0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
