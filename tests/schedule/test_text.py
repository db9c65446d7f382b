"""Programs as text read back as they were, torch pipelining's own code reads and writes the same CSV, and errors say where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lf.schedule.generate import interleaved, one_f_one_b
from lf.schedule.ir import OPS, OVERLAP, Action, Program, ProgramError
from lf.schedule.place import loop, vee
from lf.schedule.text import dumps, from_csv, loads, to_csv
from lf.schedule.zero_bubble import zb_h1, zb_v

NAMES = st.text("abcXYZ.0123_-/ ", min_size=1, max_size=8).filter(lambda s: s == s.strip())


@st.composite
def actions(draw: st.DrawFn) -> Action:
    op = draw(st.sampled_from([op for op in OPS if op != "OVERLAP"]))
    free = op in ("REDUCE", "OFFLOAD", "FETCH", "FREE")
    microbatch = draw(st.none() | st.integers(0, 300)) if free else draw(st.integers(0, 300))
    chain = draw(st.sampled_from(["", "vision", "a.b"]))
    return Action(op, draw(st.integers(0, 99)), microbatch, draw(st.none() | NAMES), tuple(draw(st.lists(NAMES, max_size=2))), chain)


ANY = actions() | st.builds(OVERLAP, actions(), actions())


@given(st.lists(st.lists(ANY, max_size=6).map(tuple), min_size=1, max_size=3).map(tuple))
def test_every_field_reads_back(program: Program) -> None:
    assert loads(dumps(program)) == program


def test_the_text_is_for_people() -> None:
    text = "# two ranks\n\n0F0 0B0  # the first\n  rank 1:   1F0 1B0[layers.1: mm, silu]\nrank 2:\n"
    program = loads(text)
    assert program[1][1] == Action("B", 1, 0, "layers.1", ("mm", "silu"))
    assert dumps(program) == "rank 0: 0F0 0B0\nrank 1: 1F0 1B0[layers.1: mm, silu]\nrank 2:\n"
    assert loads("0REMAT1[: mm]  0F1[a#b] # x") == ((Action("REMAT", 0, 1, None, ("mm",)), Action("F", 0, 1, "a#b")),)


@pytest.mark.parametrize("segment", ["a]b", "x: y", "", "a;b"])
def test_what_would_read_back_as_another_is_refused(segment: str) -> None:
    a = Action("F", 0, 1, segment)
    bad = (a,) if segment != "a;b" else (OVERLAP(a, a),)
    with pytest.raises(ProgramError, match="would not read back"):
        dumps((bad,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0\n0F1 0G1", "line 2, column 5: '0G1': unknown op 'G'"),
        ("0REDUC[x]", "line 1, column 1: '0REDUC[x]': unknown op 'REDUC'; did you mean 'REDUCE'"),
        ("0F0 0F1234567", "'0F1234567' is no action"),
        ("0F٣", "'0F٣' is no action"),
        ("0F0 F1", "line 1, column 5: 'F1' is no action"),
        ("0F0 0B", "line 1, column 5: '0B' names no microbatch"),
        ("0F0 0B0[a", "line 1, column 8: '[' is no action"),
        ("rank 1: 0F0", "line 1, column 1: 'rank 1:' should be 'rank 0:'"),
        ("rank", "should be 'rank 0:'"),
        ("(0F1)OVERLAP_F", "should be a pair"),
        ("(0F1;0B0)OVERLAP_F_F", "should end in OVERLAP_F_B"),
        ("(0F1;0X0)OVERLAP_F_X", "unknown op 'X'"),
        ("# nothing\n", "has no rank"),
    ],
)
def test_an_error_says_where(text: str, words: str) -> None:
    with pytest.raises(ProgramError) as caught:
        loads(text)
    assert words in str(caught.value)


@pytest.mark.slow  # torch takes seconds to import its pipelines
def test_torch_reads_our_csv_and_we_read_its() -> None:
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules")
    for program in (zb_v(vee(3), 7), interleaved(loop(6, 3), 5), one_f_one_b(2, 3)):
        for line, row in zip(to_csv(program).splitlines(), program):
            theirs = [pipelining._Action.from_str(cell) for cell in line.split(",")]
            assert [str(a) for a in theirs if a] == [str(a) for a in row]
    words = ["2F0", "1UNSHARD", "3SEND_F1", "4RECV_B1", "1RESHARD", "0REDUCE_GRAD", "2I3", "2W3", ""]
    if hasattr(pipelining, "OVERLAP_F_B"):
        words.append("(0F4;7B2)OVERLAP_F_B")
    again = to_csv(from_csv(",".join(words)), "compute_comms").strip().split(",")
    assert again == [w for w in words if w]
    assert [str(pipelining._Action.from_str(w)) for w in again] == again


class Written:
    """What torch's `_load_csv` and `_dump_csv` touch of a schedule."""

    def _validate_and_set_stage_mapping(self, order: object) -> None: ...

    def _prepare_schedule_with_comms(self, order: object, format: str = "compute_only") -> None:
        if format == "compute_comms":
            self.pipeline_order_with_comms = order

    def __init__(self) -> None:
        self.pipeline_order: dict[int, list[object]] = {}


@pytest.mark.slow
def test_torchs_own_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules")
    kind = pipelining.PipelineScheduleMulti
    program = zb_h1(3, 4)
    (tmp_path / "ours.csv").write_text(to_csv(program), newline="")
    theirs = Written()
    kind._load_csv(theirs, tmp_path / "ours.csv")
    assert [[str(a) for a in row if a] for row in theirs.pipeline_order.values()] == [[str(a) for a in row] for row in program]
    pipelining._validate_schedule(theirs.pipeline_order, 3, 3, 4)
    kind._dump_csv(theirs, tmp_path / "theirs.csv")
    assert from_csv((tmp_path / "theirs.csv").read_text()) == program


def test_compute_only_has_a_cell_for_each_step() -> None:
    assert to_csv(one_f_one_b(2, 2)).splitlines() == ["0F0,0F1,,0B0,,0B1", ",1F0,1B0,1F1,1B1"]


def test_torchs_names_both_ways() -> None:
    for program in (zb_v(vee(3), 7), interleaved(loop(6, 3), 5), one_f_one_b(2, 3)):
        assert from_csv(to_csv(program)) == from_csv(to_csv(program, "compute_comms")) == program
    words = "2F0,1UNSHARD,3SEND_F1,4RECV_B1,1RESHARD,0REDUCE_GRAD,2I3,2W3,(0F4;7B2)OVERLAP_F_B"
    (row,) = from_csv(words)
    assert row == (
        *(Action("F", 2, 0), Action("GATHER", 1), Action("SEND_F", 3, 1), Action("RECV_B", 4, 1), Action("RELEASE", 1), Action("REDUCE", 0)),
        *(Action("I", 2, 3), Action("W", 2, 3), OVERLAP(Action("F", 0, 4), Action("B", 7, 2))),
    )
    assert to_csv((row,), "compute_comms").strip() == words


def test_what_torch_names_otherwise_or_not_at_all() -> None:
    lowered = loads("0F0 0SEND_F0 0FREE0[SEND_F] 0RECV_B0 0B0 0REDUCE[b] 0REDUCE[a]")
    assert to_csv(lowered, "compute_comms").strip() == "0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD"
    for text in ("0F0[a]", "0F0 0REMAT0 0B0", "v:0F0", "0REDUCE[embed/weight]"):
        with pytest.raises(ProgramError, match="torch pipelining has no word for it"):
            to_csv(loads(text), "compute_comms")
    with pytest.raises(ValueError, match="unknown format"):
        to_csv(lowered, "compute")
    with pytest.raises(ProgramError, match="line 2, cell 3: '1Q0': unknown op 'Q'"):
        from_csv("0F0\n1F0,,1Q0\n")
    with pytest.raises(ProgramError, match="has no row"):
        from_csv("")
