"""Runs a script as one rank: `python -m lf.worker script.py args`. lf.launch starts every rank so.

The rank ends when its parent does, writes where the launcher reads, says which process it is, so that a signal can be sent to it, and leaves a
record of why it failed. On SIGUSR1 it writes its Python stacks to its log, that of rank 0 included. From the environment:

    LF_RANK_LOGS        folder for rankN.log, .pid, .error and where the rank is (lf/position.py); without it the script runs as under plain python
    LF_RANK0_STDOUT     where rank 0 writes: a pipe with a name, or a terminal of its own when the launcher has one, so that a progress
    LF_RANK0_STDERR     bar sees a terminal; without them rank 0 writes where its parent does
    LF_LAUNCHER         process id of the launcher: a rank that starts after the launcher's end stops at once
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path

from lf import dump

LINGER = 15.0  # seconds that a failed rank may take over its own clean-up before it is cut short: the others wait for it
ASKED = 0.2  # seconds that it leaves the launcher to ask the others where they are: when it has gone, torchrun ends them


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, however that happens. Elsewhere there is no such thing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def point(fd: int, path: str, flags: int) -> None:
    """Makes file descriptor `fd` write to (or read from) `path`."""
    new = os.open(path, flags | os.O_NOCTTY, 0o644)
    os.dup2(new, fd)
    os.close(new)


def redirect(rank: int, logs: str) -> None:
    if rank == 0:
        for fd, name in ((1, "LF_RANK0_STDOUT"), (2, "LF_RANK0_STDERR")):
            if path := os.environ.get(name):
                point(fd, path, os.O_WRONLY)
    else:
        point(0, os.devnull, os.O_RDONLY)
        point(1, os.path.join(logs, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(1, 2)
    for stream in (sys.stdout, sys.stderr):  # a pipe or file would otherwise be told in blocks, long after
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def run(script: str, args: list[str]) -> None:
    """The script as __main__, as python itself would run it."""
    path = os.path.abspath(script)
    sys.argv = [script, *args]
    sys.path[0] = os.path.dirname(path)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


def own_traceback(error: BaseException) -> str:
    """The traceback from the script's first frame on."""
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb))


def record(logs: str, rank: int, code: int, text: str, message: bool) -> None:
    """Leaves rankN.error for the launcher, whole or not at all. `message`: the script stopped with a word to the user, no traceback."""
    path = Path(logs, f"rank{rank}.error")
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"rank": rank, "time": time.time(), "code": code, "text": text, "message": message}))
    part.replace(path)


def main(argv: list[str]) -> int:
    die_with_parent()
    if launcher := os.environ.get("LF_LAUNCHER"):
        try:
            os.kill(int(launcher), 0)
        except ProcessLookupError:
            return 1
    script, args = argv[0], argv[1:]
    rank, logs = int(os.environ.get("RANK", "0")), os.environ.get("LF_RANK_LOGS")
    if not logs:
        run(script, args)
        return 0
    os.makedirs(logs, exist_ok=True)
    redirect(rank, logs)
    log = os.open(os.path.join(logs, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)  # rank 0's screen stays as it is
    listener = dump.listen(fd=log)
    Path(logs, f"rank{rank}.pid").write_text(str(os.getpid()))
    faulthandler.enable()  # a crash in native code says where Python was
    try:
        run(script, args)
        return 0
    except SystemExit as stop:
        code = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
        text, message = "" if stop.code is None or isinstance(stop.code, int) else f"{stop.code}\n", True
    except BaseException as error:
        code, text, message = 130 if isinstance(error, KeyboardInterrupt) else 1, own_traceback(error), False
    if code == 0:
        return 0
    record(logs, rank, code, text, message)
    if rank:  # rank 0's text is shown by the launcher, after the text of the rank that failed first
        sys.stderr.write(text)
    timer = threading.Timer(LINGER, os._exit, (code,))
    timer.daemon = True
    timer.start()
    if not message:
        if listener:
            listener.say()
        if launcher:
            time.sleep(ASKED)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
