"""Every generated program is whole and can run, and its bubble and its peak are what its docstring says: a wrong priority passes every other test.

`python tests/schedule/test_generate.py` writes bubbles.txt again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lf.config import ConfigError
from lf.schedule.check import check
from lf.schedule.cost import cost
from lf.schedule.generate import breadth_first, forward_only, gpipe, interleaved, one_f_one_b
from lf.schedule.greedy import greedy, greedy_zb
from lf.schedule.ir import Action, Program, ProgramError, placement
from lf.schedule.named import SCHEDULES, resolve
from lf.schedule.place import loop, stages_of, vee
from lf.schedule.text import dumps, to_csv
from lf.schedule.zero_bubble import interleaved_zb, zb_h1, zb_v

TABLE = Path(__file__).parent / "bubbles.txt"


@attrs.frozen
class Facts:
    bubble: float  # what the busiest rank waits
    peaks: tuple[float, ...]


def facts(program: Program, where: tuple[int, ...], microbatches: int, prove: bool = True) -> Facts:
    """Of a program that has each action once, where it should stand, and that `check` proves."""
    split = any(a.op == "W" for row in program for a in row)
    count = Counter((rank, a) for rank, row in enumerate(program) for a in row)
    wanted = {(where[s], Action(op, s, m)) for s in range(len(where)) for m in range(microbatches) for op in ("FIW" if split else "FB")}
    assert count.keys() == wanted
    assert set(count.values()) == {1}
    t = cost(program)
    assert all(row[-1][1] == 0 for row in t.memory)
    ranks = range(len(program))
    peaks = tuple(t.peak(r) for r in ranks)
    assert not prove or check(program) == peaks
    return Facts(min(t.bubble(r) for r in ranks), peaks)


def group(p: int, m: int) -> int:
    return -(-m // max(1, m // p))


def compare(name: str, p: int, v: int, m: int) -> None:
    """A schedule with p·v stages, or as many as it has, against its docstring."""
    s = SCHEDULES[name]
    v = s.chunks if name in ("gpipe", "1f1b", "zb-h1", "zb-v") else v
    where = s.place(p, v)
    f = facts(s.generate(where, m), where, m)
    short, full, worst = max(0, p - m), m % p == 0, max(f.peaks)
    assert f.bubble <= 3 * v * (p - 1), "above GPipe's"
    if name in ("gpipe", "breadth-first"):
        assert (f.bubble, worst) == (3 * (p - 1) + 3 * (v - 1) * short, v * m)
    elif name == "1f1b":
        assert (f.bubble, f.peaks) == (3 * (p - 1), tuple(min(m, p - r) for r in range(p)))
    elif name == "interleaved":
        assert f.bubble == 3 * (p - 1) + 3 * (v - 1) * short
        assert worst <= (v - 1) * group(p, m) + 2 * p - 1
        assert worst == min(v * m, (v + 1) * p - 1) or not full
    elif name == "zb-h1":
        assert (f.bubble, f.peaks) == (p - 1 + short, (min(m, p),) * p)
    elif name == "interleaved-zb":
        assert f.bubble == ((v + 1) * p - 1 + (v - 1) * max(p, 2 * m) - (3 * v - 2) * m if short else p - 1)
        assert worst <= (v - 1) * group(p, m) + p
        assert worst == v * p or not full
    elif name == "zb-v":
        assert f.bubble == max(p - 1, 4 * (p - 1) - 2 * (m - 1))
        assert worst == 2 * min(m, p)
    else:
        assert worst <= (v + 1) * p - 1


def other(generate, stages: int, p: int, m: int, bubble: float) -> None:  # type: ignore[no-untyped-def]
    """A last lap that is not full."""
    where = loop(stages, p)
    f = facts(generate(where, m), where, m)
    v = -(-stages // p)
    assert f.bubble <= 3 * (stages - v), "above GPipe's"
    assert f.bubble <= bubble or m < p


UNEVEN = ((breadth_first, 3), (interleaved, 3), (interleaved_zb, 1), (greedy, 10**9), (greedy_zb, 10**9))


@settings(max_examples=80)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 8), st.integers(1, 4), st.integers(1, 33))
def test_bubbles_and_peaks_are_the_closed_forms(name: str, p: int, v: int, m: int) -> None:
    compare(name, p, v, m)


@settings(max_examples=50)
@given(st.sampled_from(UNEVEN), st.integers(1, 8), st.integers(0, 24), st.integers(1, 33))
def test_stages_need_not_be_a_multiple_of_ranks(how, p: int, more: int, m: int) -> None:  # type: ignore[no-untyped-def]
    other(how[0], p + min(more, 3 * p), p, m, how[1] * (p - 1))


@pytest.mark.slow
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_all_bubbles_and_peaks(name: str, p: int) -> None:
    for v in range(1, 5) if SCHEDULES[name].chunks > 1 and name != "zb-v" else (1,):
        for m in range(1, 34):
            compare(name, p, v, m)


@pytest.mark.slow
@pytest.mark.parametrize("p", range(2, 9))
@pytest.mark.parametrize("how", UNEVEN, ids=lambda how: how[0].__name__)
def test_all_uneven_loops(how, p: int) -> None:  # type: ignore[no-untyped-def]
    for stages in [n for n in range(p, 4 * p) if n % p]:
        for m in (*range(1, 12), 16, 23, 33):
            other(how[0], stages, p, m, how[1] * (p - 1))


@pytest.mark.slow
@pytest.mark.parametrize("generate", [greedy, greedy_zb, breadth_first])
def test_a_v_is_never_above_gpipe(generate) -> None:  # type: ignore[no-untyped-def]
    for p in range(1, 9):
        for m in range(1, 34):
            assert facts(generate(vee(p), m), vee(p), m).bubble <= 3 * (2 * p - 2)


@settings(max_examples=40)
@given(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=8), st.integers(1, 9), st.integers(0, 10**6), st.booleans())
def test_any_placement_and_any_times(p: int, more: list[int], m: int, seed: int, tight: bool) -> None:
    random = Random(seed)
    where = [*range(p), *(r % p for r in more)]
    random.shuffle(where)
    most = max(map(len, stages_of(tuple(where))))
    for generate in (gpipe, breadth_first, forward_only):
        program = generate(where, m)
        assert placement(program) == tuple(where)
        cost(program)
    times = {op: random.choice([0.3, 1, 2.25]) for op in "FIW"}
    for generate in (greedy, greedy_zb):
        program = generate(where, m, times=times, link=0.2, limit=most if tight else None)
        peaks = facts(program, tuple(where), m).peaks
        assert max(peaks) <= (most if tight else (most + 1) * p - 1)
        cost(program, times, 0.2)


def test_greedy_plans_with_the_times_it_is_given() -> None:
    where, times = loop(8, 4), {"F": 1.0, "I": 0.5, "W": 2.0}
    aware, unaware = greedy_zb(where, 12, times, 0.25), greedy_zb(where, 12)
    assert cost(aware, times, 0.25).makespan < cost(unaware, times, 0.25).makespan
    for how in ({"link": 3.0}, {"times": {"B": 3}, "link": 0.5}, {"times": lambda a: 1.0 + 2 * (a.stage in (0, 7))}):
        for where in (loop(8, 4), vee(4)):
            assert cost(greedy(where, 12, **how), **how).makespan <= cost(greedy(where, 12), **how).makespan
        assert cost(greedy(loop(7, 3), 12, **how), **how).makespan < cost(greedy(loop(7, 3), 12), **how).makespan


def test_forward_only_has_the_forwards() -> None:
    assert [" ".join(map(str, row)) for row in forward_only(2, 2)] == ["0F0 0F1", "1F0 1F1"]
    assert cost(forward_only(loop(6, 3), 5)).makespan == 2 * 5 + 2



@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: one_f_one_b(loop(4, 2), 3), "one_f_one_b has one stage on each rank.*interleaved is for several"),
        (lambda: zb_h1(loop(4, 2), 3), "interleaved_zb is for several"),
        (lambda: interleaved(vee(3), 3), "interleaved has stage s on rank s mod 3.*greedy and breadth_first take any"),
        (lambda: zb_v(loop(4, 2), 3), r"zb_v needs the placement vee\(2\).*greedy_zb takes any"),
        (lambda: gpipe(2, 0), "microbatches=0 must be at least 1"),
        (lambda: gpipe(0, 1), "0 stages on 0 ranks: each rank needs a stage"),
        (lambda: gpipe((0, 2), 1), r"placement \(0, 2\): no stage on ranks \[1\]"),
        (lambda: gpipe((0, -1), 1), "there is no rank -1"),
        (lambda: gpipe((), 1), "no stage on ranks"),
        (lambda: loop(3, 4), "3 stages on 4 ranks"),
        (lambda: vee(0), "0 ranks"),
        (lambda: greedy(loop(4, 2), 3, limit=1), "limit=1: a rank with 2 stages"),
        (lambda: SCHEDULES["zb-v"].place(3, 1), "1 stages a rank: a V has 2"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ProgramError, match=words):
        make()


def test_one_stage_a_rank_in_any_order() -> None:
    where = (2, 0, 1)
    for generate in (one_f_one_b, zb_h1):
        straight, turned = generate(3, 4), generate(where, 4)
        assert tuple(turned[r] for r in where) == straight


def test_a_schedule_by_name_or_from_a_file(tmp_path: Path) -> None:
    assert resolve("1f1b") is SCHEDULES["1f1b"]
    with pytest.raises(ConfigError, match="unknown schedule '1f1d'; did you mean '1f1b'"):
        resolve("1f1d")
    (tmp_path / "mine.py").write_text(
        "from lf.schedule.generate import gpipe\nfrom lf.schedule.place import vee\n"
        "def mine(stages, microbatches):\n    return gpipe(stages, microbatches)\ndef place(ranks, chunks):\n    return vee(ranks)\nX = 1\n"
    )
    mine = resolve(f"{tmp_path}/mine.py:mine")
    assert mine.generate(mine.place(2, 2), 3) == gpipe(vee(2), 3)
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        resolve(f"{tmp_path}/mine.py:mime")
    with pytest.raises(ProgramError, match="say which function"):
        resolve(f"{tmp_path}/mine.py")
    with pytest.raises(ProgramError, match=r"cannot load .*nothing.py: FileNotFoundError"):
        resolve(f"{tmp_path}/nothing.py:f")
    program = zb_v(vee(2), 3)
    for file, text in (("p.txt", dumps(program)), ("p.csv", to_csv(program))):
        (tmp_path / file).write_text(text)
        fixed = resolve(str(tmp_path / file))
        assert fixed.generate(fixed.place(2, fixed.chunks), 3) == program
        with pytest.raises(ProgramError, match=r"is for placement .* and 3 microbatches, not for .* and 4"):
            fixed.generate(vee(2), 4)
        with pytest.raises(ProgramError, match="is for 2 pipeline ranks, not for 3"):
            fixed.place(3, 2)
    (tmp_path / "bad.txt").write_text("0F0 0Q0")
    with pytest.raises(ProgramError, match=r"bad.txt: line 1, column 5: '0Q0'"):
        resolve(str(tmp_path / "bad.txt"))
    with pytest.raises(ProgramError, match="cannot read"):
        resolve(str(tmp_path / "none.txt"))


def table() -> Iterator[str]:
    """Bubble and peak of each schedule in units of a rank's microbatch whose forward takes 1 and backward 2."""
    yield "# Bubble / most activations held, both of a rank's whole microbatch with f = i = w = 1. Written by tests/schedule/test_generate.py."
    shapes = [(2, 4), (4, 2), (4, 8), (4, 9), (8, 16), (8, 27)]
    yield " ".join([f"{'p, m':<18}", *(f"{f'{p}, {m}':>13}" for p, m in shapes)])
    for name, s in SCHEDULES.items():
        for v in (2, 3, 4) if name in ("interleaved", "interleaved-zb", "breadth-first", "greedy", "greedy-zb") else (s.chunks,):
            cells = []
            for p, m in shapes:
                where = s.place(p, v)
                f = facts(s.generate(where, m), where, m, prove=False)
                cells.append(f"{f'{f.bubble / v:.2f} / {max(f.peaks) / v:.2f}':>13}")
            yield " ".join([f"{f'{name} v={v}':<18}", *cells]).rstrip()
    for name in ("breadth-first", "greedy", "greedy-zb"):
        cells = []
        for p, m in shapes:
            f = facts(SCHEDULES[name].generate(vee(p), m), vee(p), m, prove=False)
            cells.append(f"{f'{f.bubble / 2:.2f} / {max(f.peaks) / 2:.2f}':>13}")
        yield " ".join([f"{f'{name} V':<18}", *cells])


def test_the_table_of_bubbles_is_as_it_was() -> None:
    assert [*table()] == TABLE.read_text().splitlines()


if __name__ == "__main__":
    TABLE.write_text("\n".join(table()) + "\n")
