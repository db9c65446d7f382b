"""SIGUSR1: a process says where it is, whatever it is stuck in, and goes on; nothing else that hears signals is disturbed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, processes

STUCK = {
    "a read": "os.read(os.pipe()[0], 1)",
    "native code that keeps the interpreter's lock": "ctypes.PyDLL(None).pause()",
    "Python": "while True: pass",
    "a lock": "[lock := threading.Lock(), lock.acquire(), lock.acquire()]",
}
HEAD = """
import ctypes, os, signal, subprocess, sys, threading, time
from lf import dump, signals
from lf.position import Position
"""
SAYS = """
position = Position(3, "pp=1")
position.start(position.program(["1F0", "1RECV_B0"]))
position.at(1)
dump.listen(position.line)
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    (folder / "job.py").write_text(HEAD + code)
    return subprocess.Popen(
        [sys.executable, "job.py"], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def until(stream, words: str) -> str:
    """What comes up to the line with these words."""
    said = ""
    for line in stream:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} did not come; what came is {said!r}")


@contextlib.contextmanager
def asking(job: subprocess.Popen[str]) -> Iterator[None]:
    """Again and again: one that comes before the handler has done with another may be told without a stack."""
    enough = threading.Event()

    def ask() -> None:
        job.send_signal(signal.SIGUSR1)
        while not enough.wait(0.5):
            job.send_signal(signal.SIGUSR1)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def ran(code: str, folder: Path, expect: int = 0) -> str:
    """stderr of a script that comes to its end."""
    job = start(code, folder)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == expect, said
    return said


@pytest.mark.parametrize("what", STUCK)
def test_the_stack_comes_whatever_a_process_is_stuck_in(what: str, tmp_path: Path) -> None:
    job = start(f"{SAYS}\ndef stuck():\n    print('up', flush=True)\n    {STUCK[what]}\nstuck()", tmp_path)
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "up\n"
        for _ in range(1 if "pause" in STUCK[what] else 2):  # pause ends with the first; the others go on
            with asking(job):
                until(job.stderr, "in stuck")
                if "keeps" in what:
                    break
                assert "rank 3  pp=1  step 1" in (said := until(job.stderr, "lf: rank"))
                assert said.endswith("2 of 2: 1F0 >>1RECV_B0<<\n")
    finally:
        job.kill()
        job.communicate()


def test_several_positions_of_a_process_are_all_said(tmp_path: Path) -> None:
    said = ran("dump.listen(lambda: 'one')\ndump.listen(lambda: '')\ndump.listen(lambda: 'two')\nraise SystemExit(dump.listen().say())", tmp_path)
    assert said == "lf: one\nlf: two\n"


def test_a_handler_that_is_there_is_kept(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGUSR1, lambda *_: print('own', file=sys.stderr))\nassert dump.listen(lambda: 'ours') is None\n"
    assert ran(code + "os.kill(os.getpid(), signal.SIGUSR1)", tmp_path) == "own\n"


def test_one_that_was_to_ignore_it_listens(tmp_path: Path) -> None:
    job = start("signal.signal(signal.SIGUSR1, signal.SIG_IGN)\ndump.listen(lambda: 'here')\nprint('up', flush=True)\ntime.sleep(60)", tmp_path)
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGUSR1)
    until(job.stderr, "lf: here")
    job.kill()
    job.communicate()


def test_from_another_thread_nothing_is_done(tmp_path: Path) -> None:
    ran("thread = threading.Thread(target=lambda: print(dump.listen()))\nthread.start()\nthread.join()\n"
        "assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL", tmp_path)  # fmt: skip


def test_the_other_signals_are_heard_as_before(tmp_path: Path) -> None:
    code = f"""{SAYS}
with signals.asked() as asked:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert asked() == 0
    os.kill(os.getpid(), signal.SIGUSR2)
    assert asked() == signal.SIGUSR2
    os.kill(os.getpid(), signal.SIGUSR1)
assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
"""
    assert ran(code, tmp_path).count("most recent call first") >= 2


def test_where_an_event_loop_has_the_wake_up_it_keeps_it_and_the_main_thread_speaks(tmp_path: Path) -> None:
    code = f"""
theirs = os.pipe()[1]
os.set_blocking(theirs, False)
signal.set_wakeup_fd(theirs)
{SAYS}
assert signal.set_wakeup_fd(-1) == theirs
os.kill(os.getpid(), signal.SIGUSR1)
"""
    assert "lf: rank 3" in ran(code, tmp_path)


def test_a_forked_child_says_its_own_stack_and_nothing_of_its_parent(tmp_path: Path) -> None:
    code = f"""{SAYS}
def child():
    os.dup2(os.open("child", os.O_CREAT | os.O_WRONLY), 2)
    os.kill(os.getpid(), signal.SIGUSR1)
    subprocess.run([sys.executable, "-c", "import signal; assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL"], check=True)
    assert dump.listen(lambda: "of the child")
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(1000):
        if "of the child" in open("child").read():
            os._exit(0)
        time.sleep(0.01)
    os._exit(1)
child() if (pid := os.fork()) == 0 else None
assert os.waitpid(pid, 0)[1] == 0
"""
    assert ran(code, tmp_path) == ""
    said = (tmp_path / "child").read_text()
    assert said.count("in child") == 2
    assert "rank 3" not in said


def test_an_uncaught_exception_is_followed_by_the_position(tmp_path: Path) -> None:
    said = ran(SAYS + "raise TimeoutError('nobody came')", tmp_path, expect=1)
    assert said.splitlines()[-2] == "TimeoutError: nobody came"
    assert said.splitlines()[-1].endswith("2 of 2: 1F0 >>1RECV_B0<<")


def test_a_signal_to_a_process_that_ends_does_not_kill_it(tmp_path: Path) -> None:
    code = "import atexit\natexit.register(lambda: os.kill(os.getpid(), signal.SIGUSR1))\ndump.listen(lambda: 'late')"
    assert ran(code, tmp_path) == ""


def _waits(axes, folder: Path) -> bool:
    """Rank 1 waits in gloo for rank 0, which asks it where it is and then joins."""
    axes.position.start(axes.position.program(["0F0", "0RECV_B0"]))
    axes.position.at(1)
    if axes.rank:
        os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        (folder / "pid").write_text(str(os.getpid()))
        return axes["dp"].sum(torch.ones(2)).tolist() == [2, 2]
    end = time.monotonic() + 60
    said = pid = ""
    while "2 of 2: 0F0 >>0RECV_B0<<" not in said and time.monotonic() < end:
        time.sleep(0.1)
        if not pid and (folder / "pid").exists() and (pid := (folder / "pid").read_text()):
            os.kill(int(pid), signal.SIGUSR1)
        said = (folder / "stderr").read_text() if pid else ""
    return axes["dp"].sum(torch.ones(2)).tolist() == [2, 2] and "in _waits" in said and "lf: rank 1  dp=1  step 1" in said


def test_a_rank_that_waits_in_gloo_says_so_and_goes_on(tmp_path: Path) -> None:
    assert processes(2, _waits, tmp_path) == [True, True]
