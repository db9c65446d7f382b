"""What scripts draw, compare and measure of models of several chains; and what a step of one does and does not hold."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import weakref
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers import ROOT, processes

import lf
from lf import parity, tree
from lf.chain_context import chain_context
from lf.chain_layouts import Place, chain_layouts
from lf.config import ConfigError
from lf.models.trio import trio
from lf.models.trio_data import sample
from lf.schedule import Beside, ProgramError, build_chains
from lf.schedule.feed import Units
from lf.schedule.gradients import Gradients
from lf.schedule.graphs import Graphs
from lf.schedule.placements import comparison

sys.path.insert(0, str(ROOT / "scripts"))
import bench_chains
import parity_chains

SCHEDULE = runpy.run_path(str(ROOT / "scripts/schedule.py"))
MODEL = trio()
PLACES = {"vision": Place(lf.Mesh(dp=2)), "decoder": Place(lf.Mesh(pp=2)), "head": Place(lf.Mesh(dp=1), (1,))}


def drawn(capsys: Any, **options: Any) -> str:
    SCHEDULE["main"](SCHEDULE["Config"](**options))
    return capsys.readouterr().out


def test_placements_are_drawn(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    out = drawn(capsys, chains="eyes=0.5", ranks=4, microbatches=8, out=str(tmp_path))
    for kind in ("inline", "decoupled", "nested", "dedicated"):
        assert f"eyes {kind} (50%) beside 1f1b, 4 ranks, 8 microbatches" in out
        assert (tmp_path / f"eyes-{kind}.svg").read_text().count("eyes: forward") == 1
        assert "eyes:0F0" in (tmp_path / f"eyes-{kind}.txt").read_text()
        assert json.loads((tmp_path / f"eyes-{kind}.json").read_text())["traceEvents"]
    assert "eF0" in out
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│ ")]
    found = {kind: (float(time), float(bound), float(over), held) for kind, _, time, bound, over, _, held in cells}
    (one,) = (x for x in comparison((0.5,), (4,), (2,), "1f1b", ("nested",)))
    assert found["nested"] == (pytest.approx(one.time, abs=0.0051), one.bound, pytest.approx(100 * one.over, abs=0.06), f"{one.held[0]:.3g} / 8")
    assert found["inline"][3] == "4 / 4"
    assert found["decoupled"][3] == "2 / 8"
    assert min(over for _, _, over, _ in found.values()) >= 0


def test_several_chains_are_drawn(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    asked = {"chains": "eyes=0.5:0+1,ears=0.2,hand=0.1:after", "ranks": 2, "microbatches": 4, "text": True, "show": "all", "out": str(tmp_path)}
    out = drawn(capsys, beside="nested,ears=decoupled,hand=dedicated", units=2, in_flight=4, **asked)
    assert "eyes nested (50%), ears decoupled (20%), hand dedicated (10%) beside 1f1b, 2 ranks, 4 microbatches" in out
    assert "rank 2: hand" in out
    assert "0BRIDGE_F0[eyes.output]" in out
    assert "1BRIDGE_F0[eyes.output]" in out
    assert "hand:0BRIDGE_F0[output]" in out
    program = lf.schedule.loads((tmp_path / "eyes-nested-ears-decoupled-hand-dedicated.txt").read_text())
    assert [lf.schedule.units(program, c) for c in ("", "eyes", "ears", "hand")] == [4, 2, 2, 4]
    out = drawn(capsys, **asked)  # what is after stays where the pipeline ends
    assert [f"eyes {kind} (50%), ears {kind} (20%), hand inline" in out for kind in ("inline", "decoupled", "nested", "dedicated")] == [True] * 4


def test_chains_stand_beside_any_program(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.txt").write_text(lf.schedule.dumps(lf.schedule.one_f_one_b(3, 5)))
    out = drawn(capsys, chains="eyes=0.5:2", beside="inline", schedule=str(tmp_path / "p.txt"))
    assert "3 ranks, 5 microbatches" in out
    out = drawn(capsys, chains="eyes=0.5:2", beside="inline", placement="0,1,2,3,3,2,1,0", schedule="zb-v", microbatches=4)
    assert "4 ranks, 4 microbatches" in out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"chains": "eyes"}, "--chains eyes: give a name and a time, as vision=0.5"),
        ({"chains": "ears=1,eyes=-1"}, "--chains eyes=-1: give a name and a time"),
        ({"chains": "eyes=nan"}, "--chains eyes=nan: give a name and a time"),
        ({"chains": "eyes=0.5,eyes=0.5:1"}, r"--chains eyes=0.5:1: eyes is there already; .* as eyes=0.5:0\+2"),
        ({"chains": "eyes=0.5:4"}, "--chains eyes=0.5:4: '4' of eyes should be a stage that it feeds, 0 to 3"),
        ({"chains": "eyes=0.5:1+1"}, "'1' of eyes should be a stage that it feeds, 0 to 3, each once"),
        ({"chains": "eyes=0.5:"}, "'' of eyes should be a stage"),
        ({"chains": "eyes=0.5:behind"}, "'behind' of eyes should be a stage .*; or 'after'"),
        ({"chains": "eyes=0.5", "beside": "above"}, "unknown value for --beside: 'above'"),
        ({"chains": "eyes=0.5", "beside": "eyes=above"}, "unknown value for --beside eyes: 'above'"),
        ({"chains": "eyes=0.5", "beside": "ears=inline"}, "unknown chain for --beside: 'ears'"),
        ({"chains": "hand=0.5:after", "beside": "hand=nested"}, "chain 'hand' takes from chain '', so it cannot be nested"),
        ({"chains": "eyes=0.5", "compare": ()}, "leave out --compare"),
        ({"chains": "eyes=0.5", "beside": "nested", "in_flight": 1}, "use in_flight=4 or more"),
        ({"chains": "eyes=0.5", "beside": "inline", "in_flight": 4}, "--in-flight 4: for chains that feed .* and are dedicated or nested: none is"),
        ({"chains": "eyes=0.5", "beside": "inline", "units": 4}, "--units 4: for chains that feed"),
        ({"chains": "eyes=0.5", "beside": "decoupled", "units": 9}, "chain 'eyes': units=9 of 8 microbatches"),
        ({"chains": "eyes=0.5", "units": 0}, "--units 0: must be at least 1"),
        ({"beside": "nested", "units": 2}, "--beside, --units: of chains beside the pipeline; name some with --chains"),
        ({"chains_table": True, "ranks": 4, "in_flight": 3}, "leave out --in-flight, --ranks"),
        ({"chains_table": True, "schedule": "mine.py:snake"}, "unknown schedule for --chains-table"),
    ],
)
def test_odd_requests_are_refused(options: dict[str, Any], why: str, capsys: Any) -> None:
    with pytest.raises((ConfigError, ProgramError), match=why):
        drawn(capsys, **options)


def test_the_numbers_of_the_page_are_those_of_the_table() -> None:
    page = (ROOT / "docs/chains.md").read_text(encoding="utf-8")
    found = {(x.ranks, x.microbatches, x.share, x.kind): x for x in comparison((0.1, 0.5, 1.5), (4, 8, 16), (4,), "1f1b")}
    for ranks, m, share, *told in (
        (4, 16, 0.1, "0.1 %", "2.1 %", "6.8 %"), (4, 16, 0.5, "2.2 %", "10.5 %", "34.2 %"), (8, 32, 0.5, "0.2 %", "5.1 %", "32.1 %"),
        (8, 32, 1.5, "5.8 %", "15.4 %", "108 %"), (16, 64, 1.5, "0.3 %", "7.6 %", "106 %"),
    ):  # fmt: skip
        row = next(line for line in page.splitlines() if line.startswith(f"| {ranks}, {m} | {share:.0%}".replace("%", " %")))
        for kind, words in zip(("nested", "decoupled", "inline"), told):
            assert words in row
            assert float(words.split()[0]) == pytest.approx(100 * found[ranks, m, share, kind].over, abs=0.51 if "." not in words else 0.051)


def measured(axes: Any, config: bench_chains.Config) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lf, "connect", lambda mesh, device: axes)
        bench_chains.main(config)
    return out.getvalue()


def test_placements_are_measured_and_agree(tmp_path: Path) -> None:
    tiny = bench_chains.Config(
        device="cpu", precision="fp64", microbatches=3, layers=4, vision_layers=2, dim=16, tokens=24, images=2, patches=6, rounds=1,
        json=str(tmp_path / "found.json"), picture=str(tmp_path / "step.svg"),
    )  # fmt: skip
    said, silent = processes(2, measured, tiny)
    assert "loss and gradient norm are equal" in said
    assert not silent
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["equal"]
    assert [*found["placements"]] == ["inline", "decoupled", "nested"]
    assert all((tmp_path / f"step-{kind}.svg").exists() for kind in found["placements"])
    assert 0 <= found["fixed"] <= 1
    assert f"{found['fixed']:.0%} of the encoder's time does not shrink" in said


def test_the_constant_part_of_a_measured_encoder() -> None:
    """Times that are a line over the cost of the images: 3 s and, on average, 2 s more."""
    layouts = chain_layouts(MODEL, {**PLACES, "vision": Place(lf.Mesh(dp=1), (0,))})
    program = build_chains(layouts, 4, {"vision": "inline", "head": "inline"})
    data = [[sample(MODEL.config, 0, m, 0, 2)] for m in range(4)]
    costs = [sum(MODEL.chains["vision"].items(row[0]).cost) for row in data]
    mean = sum(costs) / len(costs)
    mine = program[0]
    share = {m: sum(a.chain == "vision" and a.op in "FB" and a.microbatch == m for a in mine) for m in range(4)}
    times = {i: (3 + 2 * costs[a.microbatch] / mean) / share[a.microbatch] for i, a in enumerate(mine) if a.chain == "vision" and a.op in "FB"}
    assert bench_chains.constant(mine, [times], layouts, data) == pytest.approx(0.6)
    assert bench_chains.constant(program[1], [{}], layouts, data) == 0.0  # this row has nothing of it


def test_parity_as_a_user_asks_for_it(capsys: Any) -> None:
    parity_chains.main(parity_chains.Config(device="cpu", microbatches=2, place=("nested",), freeze=("vision.*",)))
    assert "ok: mesh vision dp=2; decoder pp=2" in capsys.readouterr().out
    for options, why in (
        ({"vision": "dp=2@0-x"}, "'0-x' should be a rank"),
        ({"freeze": ("norm",)}, "begin with the chain"),
        ({"place": ("dedicated",)}, "chain 'vision' is to have rows of its own"),
        ({"head": "dp=1@0", "place": ("inline",)}, "chain 'head': inline would stand on row 1"),
    ):
        with pytest.raises((ConfigError, ProgramError), match=why):
            parity_chains.main(parity_chains.Config(device="cpu", microbatches=2, **options))  # type: ignore[arg-type]


def test_nothing_compared_is_no_agreement(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each placement is left out with its reason, and the end is an error that says so, not the 0 of "all agree"."""
    monkeypatch.setattr(sys, "argv", ["parity_chains", "--device", "cpu", "--microbatches", "2", "--head", "dp=1@0"])
    with pytest.raises(SystemExit) as end:
        lf.cli.judge(parity_chains.main, parity_chains.Config)
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.out.count("left out: encoder ") == 4
    assert "nothing was compared, every placement was left out" in said.err
    assert "ok:" not in said.out


def step(axes: Any, layouts: Any, program: Any, m: int) -> Any:
    ctx = chain_context(layouts, axes, lf.devices.get("cpu"), "fp64")
    data = [[sample(MODEL.config, 0, i, 0, 2)] for i in range(m)]
    return lf.train.gradients(layouts, program, ctx)(parity.randomised(layouts, ctx, 0), data)


def test_what_is_frozen_has_no_gradient_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a sum of its own nor a gradient that autograd made."""
    frozen = {"vision": ("vision.*",), "decoder": ("decoder.embed", "decoder.layers.1*")}
    layouts = chain_layouts(MODEL, {c: attrs.evolve(p, frozen=frozen.get(c, ())) for c, p in PLACES.items()})
    sums, leaves = set[str](), []
    buffer, init = Gradients.buffer, Graphs.__init__

    def noted(self: Gradients, path: str) -> torch.Tensor:
        sums.add(path)
        return buffer(self, path)

    def made(self: Graphs, *args: Any) -> None:
        init(self, *args)
        leaves.extend((path, leaf) for path, leaf in self.leaves.items())

    monkeypatch.setattr(Gradients, "buffer", noted)
    monkeypatch.setattr(Graphs, "__init__", made)
    program = build_chains(layouts, 3, {"vision": "nested", "head": "inline"})
    results = lf.sim.spmd(lf.Mesh(dp=2), step, layouts, program, 3)
    given = {path for grads, _ in results for path, _ in tree.items(grads)}
    assert given | sums == set(MODEL.params()) - layouts.frozen
    assert layouts.frozen
    assert {path for path, leaf in leaves if leaf.requires_grad} == set(MODEL.params()) - layouts.frozen
    assert not [path for path, leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("m", [8, 16, 32])
def test_nested_units_alive_at_a_time_are_few(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forwards of the encoder have kept, and the batches of its units: counted as the interpreter runs, on each rank."""
    alive: dict[int, list[weakref.ref[Any]]] = {}
    most, seen = [0], dict[int, int]()
    make, get = Graphs.make, Units.__getitem__

    def counted(self: Graphs, piece: Any, *args: Any, **named: Any) -> Any:
        out = make(self, piece, *args, **named)
        if piece.name == "vision.merger":
            mine = alive.setdefault(self.ctx.axes.rank, [])
            mine.append(weakref.ref(out[0]))
            most[0] = max(most[0], sum(ref() is not None for ref in mine))
        return out

    def taken(self: Units, unit: int) -> Any:
        out = get(self, unit)
        if "patches" in out.plan and "tokens" not in out.plan:  # of the encoder
            seen[id(self)] = max(seen.get(id(self), 0), len(self.made))
        return out

    monkeypatch.setattr(Graphs, "make", counted)
    monkeypatch.setattr(Units, "__getitem__", taken)
    layouts = chain_layouts(MODEL, {**PLACES, "head": attrs.evolve(PLACES["head"])})
    program = build_chains(layouts, m, {"vision": Beside("nested", in_flight=4), "head": "inline"})
    lf.sim.spmd(lf.Mesh(dp=2), step, layouts, program, m)
    assert 1 <= most[0] <= 4
    assert max(seen.values()) <= 4
