"""Watches the ranks of one machine: shows rank 0 as it runs, keeps every log, finds the rank that failed first, ends them all. No torch.

SIGTERM and SIGUSR2 are passed on to the ranks themselves (torchrun would not pass on the second), which may save and end in order; a second
signal ends all at once. SIGINT and SIGHUP go to torchrun, which ends the ranks. SIGUSR1 ends nothing: it draws where the ranks are, as the
report of a failed run does, and each rank writes its Python stacks to its log.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from lf import position, worker

GRACE = 30.0  # seconds for the ranks to end by themselves before they are killed
SAVING = 600.0  # the same where they were asked to save first
ANSI = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
# What a rank says when another one has gone: never the first cause when any rank says something else.
LOST_PEER = re.compile(
    r"Connection (?:closed|reset|refused|timed out|was likely closed)|Broken pipe|Socket Timeout|DistNetworkError|recvValue failed|"
    r"gloo/transport|ncclRemoteError|remote process exited|failed to recv|Timed out waiting|wait timeout"
)
# Of torchrun's log: a process that was still there when another had failed. How that one ended then is no cause.
TOLD_TO_END = re.compile(r"(Sending|Unable to shutdown) process (\d+)")
PASSED_ON = (signal.SIGTERM, signal.SIGUSR2)
STOP = (signal.SIGINT, signal.SIGHUP, *PASSED_ON)


def channel(fd: int, folder: str) -> tuple[int, str, list[int]]:
    """Where rank 0 writes instead of our `fd`: (end to read, path for the rank, descriptors to keep open so that it never ends).

    On a terminal it gets a terminal of its own, unchanged bytes and all: a progress bar draws as if it wrote on ours."""
    if os.isatty(fd):
        reader, keep = os.openpty()
        tty.setraw(keep)
        path = os.ttyname(keep)
    else:
        path = os.path.join(folder, f"rank0.{fd}")
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        keep = os.open(path, os.O_WRONLY)
    os.set_blocking(reader, False)
    return reader, path, [keep]


def resize(source: int, target: int) -> None:
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8)
        if struct.unpack("HHHH", size)[1]:
            fcntl.ioctl(target, termios.TIOCSWINSZ, size)


def _resized(source: int, target: int, got: int, frame: object) -> None:
    resize(source, target)


def plain(chunk: bytes, rest: bytes) -> tuple[bytes, bytes]:
    """(lines for the log, unfinished line) of terminal output: no colours, and of a line drawn over and over only its last state."""
    *lines, rest = (rest + chunk).split(b"\n")
    if (drawn := rest.rfind(b"\r", 0, -1)) > 0:
        rest = rest[drawn:]
    return b"".join(ANSI.sub(b"", line).rstrip(b"\r").rsplit(b"\r", 1)[-1] + b"\n" for line in lines), rest


def show(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def attend(command: Sequence[str], env: dict[str, str], logs: Path, ranks: range, torchrun: bool) -> int:
    """Runs the command that runs these ranks, to its end. Returns the exit code: 0, the failing rank's, or 128 + the signal that ended us.

    SIGUSR2 asks for an early end and nothing else: when the ranks end well it is 0."""
    logs.mkdir(parents=True, exist_ok=True)
    for rank in ranks:
        for kind in ("error", "pid", "at", "program"):
            (logs / f"rank{rank}.{kind}").unlink(missing_ok=True)
    folder = tempfile.mkdtemp(prefix="lf-")
    stop: list[int] = []
    ask: list[int] = []
    before = {number: signal.signal(number, lambda got, frame: stop.append(got)) for number in STOP}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda got, frame: ask.append(got))
    sys.stdout.flush()
    try:
        code = _run(command, env, logs, ranks, torchrun, folder, stop, ask)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(logs / f"torchrun{ranks.start}", ignore_errors=True)
    if (stop or code) and os.isatty(1):
        sys.stdout.write("\x1b[?25h")  # a progress bar that was cut short has hidden the cursor
        sys.stdout.flush()
    if stop == [signal.SIGUSR2] and code == 0:
        return 0
    if stop and stop[0] != signal.SIGPIPE:
        print(f"\nlf: ended by {signal.Signals(stop[0]).name}; logs in {logs}", file=sys.stderr)
    if stop:
        return 128 + stop[0]
    return report(code, logs, ranks) if code else 0


def _run(
    command: Sequence[str], env: dict[str, str], logs: Path, ranks: range, torchrun: bool, folder: str, stop: list[int], ask: list[int]
) -> int:
    ends: dict[int, int] = {}  # end to read → our descriptor
    both = os.isatty(1) and os.isatty(2)
    if 0 in ranks:
        for fd, name in ((1, "LF_RANK0_STDOUT"), (2, "LF_RANK0_STDERR")):
            if fd == 2 and both:
                env[name] = env["LF_RANK0_STDOUT"]
                continue
            reader, env[name], keep = channel(fd, folder)
            ends[reader] = fd
            if os.isatty(fd):
                resize(fd, keep[0])
                signal.signal(signal.SIGWINCH, partial(_resized, fd, keep[0]))
    me = os.getpid()
    env["LF_LAUNCHER"] = str(me)

    def first() -> None:  # in the child, before it becomes the command
        worker.die_with_parent()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a cluster may send it to every process: torchrun, and a rank that does not listen yet
        if os.getppid() != me:
            os._exit(1)

    files = contextlib.ExitStack()
    noise = files.enter_context(open(logs / f"torchrun{ranks.start}.log", "wb")) if torchrun else None  # noqa: SIM115
    (logs / "rank0.log").unlink(missing_ok=True)
    log = files.enter_context(open(logs / "rank0.log", "ab", buffering=0)) if ends else None  # noqa: SIM115  # rank 0 appends its stacks
    rests = dict.fromkeys(ends, b"")

    def drain() -> bool:
        got = False
        for reader in ends:
            with contextlib.suppress(BlockingIOError):
                while data := os.read(reader, 1 << 16):
                    got = True
                    show(ends[reader], data)
                    if log and os.isatty(ends[reader]):
                        data, rests[reader] = plain(data, rests[reader])
                    if log:
                        log.write(data)
        return got

    # A session of its own: Ctrl-C reaches us alone, and we end the ranks in order.
    child = subprocess.Popen(command, env=env, stdout=noise, stderr=noise, preexec_fn=first, start_new_session=True)
    told, failed = 0.0, False
    with files, child:
        try:
            while child.poll() is None:
                select.select(list(ends), [], [], 0.05)
                try:
                    drain()
                except BrokenPipeError:  # whoever read us has gone, as `| head` does
                    stop.append(signal.SIGPIPE)
                    ends.clear()
                if ask:
                    ask.clear()
                    pass_on(signal.SIGUSR1, logs, ranks)
                    with contextlib.suppress(OSError):  # whoever read us has gone
                        print(f"\n{whereabouts(logs, ranks)}", file=sys.stderr, flush=True)
                if torchrun and not failed and (found := records(logs, ranks)):
                    failed = True  # the others still are where they hang; torchrun ends them when this one has gone
                    if not any(record["message"] for record in found):
                        pass_on(signal.SIGUSR1, logs, sorted({*ranks} - {record["rank"] for record in found}))
                if stop and not told:
                    told = time.monotonic()
                    if stop[0] not in PASSED_ON or not pass_on(stop[0], logs, ranks):
                        child.terminate()
                elif stop and (len(stop) > 1 or time.monotonic() - told > (SAVING if stop[0] in PASSED_ON else GRACE)):
                    child.kill()  # and every rank with it
            with contextlib.suppress(BrokenPipeError):
                drain()
        finally:
            child.kill()
        for reader, rest in rests.items():
            if log and rest and reader in ends:
                log.write(plain(b"\n", rest)[0])
    return child.returncode


def pass_on(number: int, logs: Path, ranks: Iterable[int]) -> int:
    """Sends a signal to every rank that has said which process it is; returns how many there are."""
    sent = 0
    for rank in ranks:
        with contextlib.suppress(OSError, ValueError):  # not started yet, or at its end
            os.kill(int((logs / f"rank{rank}.pid").read_text()), number)
            sent += 1
    return sent


def records(logs: Path, ranks: range) -> list[dict]:
    """What the ranks that failed have left."""
    return [json.loads(path.read_text()) for rank in ranks if (path := logs / f"rank{rank}.error").exists()]


def whereabouts(logs: Path, ranks: range, until: float | None = None) -> str:
    """The drawing of where the ranks are, or were at the time `until`, seconds since the epoch; and where their stacks stand."""
    drawn = position.draw([position.read(logs, rank) for rank in ranks], until)
    which = f"rank{ranks.start}.log" if len(ranks) == 1 else f"rank{ranks.start}.log … rank{ranks[-1]}.log"
    return f"lf: where the ranks {'are' if until is None else 'were'}:\n{drawn}\n  Python stacks: {logs / which}"


def root_cause(records: Sequence[dict], torchrun: str, ranks: range) -> dict | None:
    """Which rank failed first: {"rank", "code", "text"}.

    The earliest record that does not merely say that another rank was lost; else the rank that torchrun saw end without leaving a record
    (a signal, os._exit) before it told the others to end; else the earliest record."""
    known = {record["rank"] for record in records}
    own = [record for record in records if not LOST_PEER.search(record["text"])]
    if own:
        first = min(own, key=lambda record: record["time"])
        same = [record for record in own if (record["code"], record["text"]) == (first["code"], first["text"])]
        return min(same, key=lambda record: record["rank"])  # all refuse the same thing: rank 0 has said so already
    told = {pid for _, pid in TOLD_TO_END.findall(torchrun)}
    for code, local, pid in re.findall(r"exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)", torchrun) + [
        (code, local, pid) for local, code, pid in re.findall(r"\(local_rank: (\d+)\)\s+exitcode\s*: (-?\d+) \(pid: (\d+)\)", torchrun)
    ]:
        if ranks.start + int(local) not in known and pid not in told and int(code) != -signal.SIGTERM:
            return {"rank": ranks.start + int(local), "code": int(code), "text": ""}
    return min(records, key=lambda record: record["time"], default=None)


def report(code: int, logs: Path, ranks: range) -> int:
    """Says which rank failed first and why; returns its exit code."""
    left = records(logs, ranks)
    noise = logs / f"torchrun{ranks.start}.log"
    said = noise.read_text(errors="replace") if noise.exists() else ""
    cause = root_cause(left, said, ranks)
    until = min((record["time"] for record in left), default=time.time())
    at_work = any(position.read(logs, rank).count for rank in ranks)  # else it failed before there was a place to be at
    drawn = f"\n{whereabouts(logs, ranks, until)}" if at_work else ""
    killed = {pid for what, pid in TOLD_TO_END.findall(said) if what != "Sending"}
    drawn += "".join(f"\n  rank {r} did not end when it was told to, and was killed" for r in ranks if _pid(logs, r) in killed)
    for record in left:
        if record["rank"] == 0 and record["text"]:
            with open(logs / "rank0.log", "a") as log:
                log.write(record["text"])
    if cause is None and noise.exists():
        print(f"lf: torchrun failed (exit code {code}) before any rank did; the end of {noise}:\n{tail(noise)}{drawn}", file=sys.stderr)
        return code if code > 0 else 128 - code
    cause = cause or {"rank": ranks.start, "code": code, "text": ""}
    rank, code, words = cause["rank"], cause["code"], cause["text"]
    path = logs / f"rank{rank}.log"
    if not words and rank:  # what rank 0 said is on the screen
        words = f"the end of its log:\n{tail(path)}\n"
    if not cause.get("message") or not cause["text"]:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
        words = f"rank {rank} {how}{':' if words else ''}\n{words}"
    others = "; the other ranks were ended" if len(ranks) > 1 else ""
    code = 128 - code if code < 0 else code
    print(f"{words}{drawn}\nlf: rank {rank} stopped first (exit code {code}){others}. Its log: {path}", file=sys.stderr)
    return code


def _pid(logs: Path, rank: int) -> str:
    path = logs / f"rank{rank}.pid"
    return path.read_text().strip() if path.exists() else ""


def tail(path: Path, lines: int = 15) -> str:
    if not path.exists():
        return ""
    return "\n".join("    " + line for line in path.read_text(errors="replace").splitlines()[-lines:])
