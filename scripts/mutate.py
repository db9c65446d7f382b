"""Do the tests notice? Breaks one thing at a time on purpose and runs the part of the suite that should fail.

    scripts/launch mutate                       every mutation
    scripts/launch mutate --sample 6            some, by a seed that is printed
    scripts/launch mutate --match normaliser    those with this word

torch and the tests are imported once; each mutation lives in a forked child, in memory: no file is changed. Exit code 0: every mutation was
killed. 1: some survived. 2: it could not run, whatever the reason.
"""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import attrs
from rich.markup import escape

import lf

ROOT = Path(__file__).resolve().parents[1]
RANKS = 1
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/lib"), str(ROOT / "tests")]
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow")
PASSED = "no test failed"
Job = tuple[str, Callable[[], None], tuple[str, ...]]  # name, what breaks something, tests


@attrs.frozen
class Config:
    sample: int | None = None  # this many, instead of all
    seed: int | None = None  # of the sample; drawn and printed when not given
    match: str = ""  # only mutations whose name has this in it
    clean: bool = True  # run the tests without any mutation first: they must pass
    limit_s: float = 60.0  # for one mutation; one that hangs is killed by it


@attrs.frozen
class Result:
    """`by` is the test that failed; '' where none did. A mutation that hangs or dies is no proof: the suite must fail, not stop."""

    name: str
    by: str
    why: str
    seconds: float


def main(config: Config) -> None:
    import mutations  # scripts/lib: imports torch

    known = [m for m in mutations.ALL if config.match in m.name]
    if not known:
        raise lf.config.ConfigError(f"--match {config.match!r} matches none of the {len(mutations.ALL)} mutations")
    screen = lf.console.console()
    if config.sample is not None:
        if config.sample < 1:
            raise lf.config.ConfigError(f"--sample {config.sample}: at least 1")
        seed = random.SystemRandom().randrange(10**6) if config.seed is None else config.seed
        known = random.Random(seed).sample(known, min(config.sample, len(known)))
        screen.print(f"{len(known)} of {len(mutations.ALL)} mutations, --seed {seed}")
    if stale := [f"{m.name}: {why}" for m in known if (why := mutations.stale(m))]:
        raise lf.config.ConfigError(f"the code has changed under mutations; write these anew in scripts/lib/mutations.py: {'; '.join(stale)}")

    if failing := warm(sorted({t for m in known for t in m.tests}), config.clean):
        raise lf.config.ConfigError(f"the suite fails without any mutation: {failing}; mend that first")
    results: list[Result] = []
    with lf.console.Bar(screen, "mutations", len(known)) as bar:
        for result in outcomes([(m.name, m.apply, m.tests) for m in known], config.limit_s):
            results.append(result)
            bar.at(len(results), values={"last": result.name})
    survived = [r for r in results if not r.by]
    rows = [(escape(r.name), escape(r.by or f"SURVIVED: {r.why}"), f"{r.seconds:.1f}") for r in results]
    screen.print(lf.console.table("breaking one thing at a time", ("mutation", "killed by", "s"), rows))
    for r in survived:
        screen.print(f"SURVIVED: {r.name}: {r.why}", style="red", markup=False)
    screen.print(f"{len(results) - len(survived)} of {len(results)} killed", style="red" if survived else "green")
    if survived:
        sys.exit(1)


def warm(tests: list[str], clean: bool) -> str:
    """Imports the tests into this process, so that no child has to; with `clean` runs them once in a child. '' when they pass."""
    import pytest
    import torch

    torch.set_num_threads(1)  # no thread may live when children are forked
    os.chdir(ROOT)
    with quiet():
        code = pytest.main([*OPTIONS, "--collect-only", *tests])
    if code:
        return f"pytest cannot collect {' '.join(tests)} (exit code {int(code)})"
    if not clean:
        return ""
    (result,) = outcomes([("nothing", lambda: None, tuple(tests))], 600)
    return result.by or (result.why if result.why != PASSED else "")


def outcomes(jobs: list[Job], limit_s: float) -> Iterator[Result]:
    """What the tests say with each mutation, in a forked child each, as many at once as there are cores; in the order in which they end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fork, left, running = get_context("fork"), list(jobs), dict[Any, tuple[str, Any, float]]()
    try:
        while left or running:
            while left and len(running) < cores:
                name, apply, tests = left.pop(0)
                ours, theirs = fork.Pipe(duplex=False)
                child = fork.Process(target=_child, args=(theirs, apply, tests))
                child.start()
                theirs.close()
                running[ours] = (name, child, time.monotonic())
            ready = wait(list(running), 1.0)
            for pipe, (name, child, began) in list(running.items()):
                seconds = time.monotonic() - began
                if pipe in ready:
                    try:
                        by, why = pipe.recv()
                    except EOFError:
                        by, why = "", "the child died"
                elif seconds > limit_s:
                    by, why = "", f"nothing in {limit_s:.0f} s"
                else:
                    continue
                del running[pipe]
                _end(child)
                yield Result(name, by, why, seconds)
    finally:
        for _, child, _ in running.values():
            _end(child)


def _end(child: Any) -> None:
    """The child and the processes that its tests have started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.join()


def _child(pipe: Any, apply: Callable[[], None], tests: tuple[str, ...]) -> None:
    import pytest

    os.setsid()

    class Watch:
        failed = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                self.failed = self.failed or report.nodeid

    watch = Watch()
    try:
        apply()
        with quiet():
            code = pytest.main([*OPTIONS, *tests], plugins=[watch])
        why = PASSED if code == 0 else f"pytest stopped with code {int(code)}"
    except BaseException as error:
        why = f"it could not be applied: {type(error).__name__}: {error}"
    pipe.send((watch.failed, why))
    os._exit(0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing reaches the screen: pytest's own report of a broken suite is not ours to show."""
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    _point(null, null)
    try:
        yield
    finally:
        _point(*saved)
        for number in (null, *saved):
            os.close(number)


def _point(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


if __name__ == "__main__":
    lf.cli.judge(main, Config)  # exit code 1 is what it found; 2: it could not run
