"""What all optimizers have in common: any layout, skipped updates, groups, an average of the weights, state in the host's memory."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from chained import at, laid_out
from helpers import context
from optim_reference import agree, cut, torch_updated, updated, wholes

import lf
from lf import memory, optim, tree
from lf.chain_layouts import joined
from lf.checkpoint import native
from lf.models.small import tiny, tiny_moe
from lf.optim.matrices import hidden_matrix
from lf.schedule.memory import OutOfMemory
from lf.spec import Param

LR = 0.125  # float32 has it: a rate is computed there
MAKES: dict[str, Any] = {
    "adamw": partial(optim.adamw, LR),
    "adamw in bf16": partial(optim.adamw, LR, moments="bf16"),
    "adamw to the nearest": partial(optim.adamw, LR, moments="bf16", rounding="nearest"),
    "sgd": partial(optim.sgd, LR),
    "muon": partial(optim.muon, LR),
    "muon gathered in bf16": partial(optim.muon, LR, way="gathered", moments="bf16"),
    "groups": lambda: optim.groups([(is_norm, optim.adamw(optim.times(0.5, LR), weight_decay=0.0))], optim.adamw(LR)),
    "ema": lambda: optim.ema(optim.adamw(LR), 0.9),
}


def is_norm(param: Param) -> bool:
    return len(param.shape) == 1


def whole() -> lf.layouts.Layout:
    return lf.layout(tiny_moe(), lf.Mesh(dp=1))


@pytest.mark.parametrize(("mesh", "sharding"), [("tp=2,dp=2", "0"), ("tp=2,dp=2", "1"), ("ep=2,etp=2,dp=4", "1"), ("dp=4", "2,ranks=2")])
def test_adamw_is_torch_adamw_under_any_layout(mesh: str, sharding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = lf.layout(tiny_moe(), lf.Mesh.parse(mesh), sharding=sharding)
    states = lf.sim.spmd(layout.mesh, updated, layout, optim.adamw(LR, weight_decay=0.3), 4)
    agree(layout, states, "master", torch_updated(layout, lambda param: False, 4, LR, 0.3, monkeypatch), 1e-12)


def pieces_of(layout: lf.layouts.Layout, state: tree.Tree, kind: str) -> dict[str, torch.Tensor]:
    """Of one rank that has everything."""
    return {p.key: p.view(x) for path, x in tree.items(state[kind]) for p in joined(layout).state_pieces(path, 0)}


@pytest.mark.parametrize(("mesh", "sharding"), [("tp=2,dp=2", "1"), ("ep=2,etp=2,tp=2,dp=2", "1"), ("tp=3,dp=2", "0")])
def test_moments_in_bf16_are_the_same_to_the_bit_under_any_layout(mesh: str, sharding: str) -> None:
    (one,) = lf.sim.spmd(lf.Mesh(dp=1), updated, whole(), MAKES["adamw in bf16"](), 4, 0.5, "fp32")
    layout = lf.layout(tiny_moe(), lf.Mesh.parse(mesh), sharding=sharding)
    states = lf.sim.spmd(layout.mesh, updated, layout, MAKES["adamw in bf16"](), 4, 0.5, "fp32")
    for kind in ("m", "v", "master"):
        assert all(x.dtype == (torch.float32 if kind == "master" else torch.bfloat16) for state in states for x in tree.leaves(state[kind]))
        agree(layout, states, kind, pieces_of(whole(), one, kind), 0.0)


def test_an_average_moves_by_chance_and_stands_still_to_the_nearest() -> None:
    """v is 1 and its gradients are √2: with β2 = 0.999 each update adds 1/1000 to it, less than bfloat16 sees."""
    layouts = joined(lf.layout(tiny(), lf.Mesh(dp=1)))
    path = "embed/weight"
    ends = {}
    for rounding in ("stochastic", "nearest"):
        optimizer = optim.adamw(0.0, betas=(0.9, 0.999), moments="bf16", rounding=rounding)
        state = optimizer.init(cut(layouts, 0, wholes(layouts, "w"), torch.float32), torch.device("cpu"), layouts)
        tree.get(state["v"], path).fill_(1.0)
        for i in range(100):
            grads = tree.map(lambda w: torch.full_like(w, math.sqrt(2)), state["master"])
            scalars = (torch.tensor(0.0), torch.tensor(1.0), torch.tensor(i), torch.tensor(True))
            params = {path: layouts.specs[path].param}
            state = optimizer.update(state, grads, params, *scalars, context(lf.solo(), "fp32"), layouts)
        ends[rounding] = tree.get(state["v"], path).to(torch.float64)
    assert (ends["nearest"] == 1).all()
    want = 2 - 0.999**100
    spread = ends["stochastic"].std() / math.sqrt(ends["stochastic"].numel())
    assert abs(ends["stochastic"].mean() - want) < 5 * spread
    assert spread < (want - 1) / 50


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_update_leaves_every_bit(name: str, value: float) -> None:
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    layouts, ctx, optimizer = joined(layout), context(lf.solo(), "fp32"), MAKES[name]()
    params = {path: spec.param for path, spec in layouts.specs.items()}
    state = updated(lf.solo(), layout, optimizer, 1, 0.5, "fp32")
    before = tree.map(torch.clone, state)
    bad = tree.map(lambda w: torch.full_like(w, value), state["master"])
    x = torch.tensor(value)
    state = optimizer.update(state, bad, params, x, x, torch.tensor(1), torch.tensor(False), ctx, layouts)
    assert dict(tree.items(state)).keys() == dict(tree.items(before)).keys()
    for path, was in tree.items(before):
        assert torch.equal(tree.get(state, path), was), path


def test_each_group_has_its_rate_and_decay() -> None:
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    layouts = joined(layout)
    twice = optim.times(2, lambda step: torch.tensor(LR))
    optimizer = optim.groups([(is_norm, optim.sgd(optim.times(0.5, LR))), (hidden_matrix, optim.sgd(twice))], optim.sgd(LR))
    state = updated(lf.solo(), layout, optimizer, 1)
    w, g = (cut(layouts, 0, wholes(layouts, *key)) for key in (("w",), ("g", 0)))
    for path, spec in layouts.specs.items():
        factor = 0.5 if is_norm(spec.param) else 2 if hidden_matrix(spec.param) else 1
        want = tree.get(w, path) - factor * LR * 0.5 * tree.get(g, path)
        torch.testing.assert_close(tree.get(state["master"], path), want, rtol=1e-14, atol=1e-14, msg=path)
    assert optimizer.lr(torch.tensor(0)) == LR


def test_groups_of_one_kind_count_their_updates_apart() -> None:
    state = updated(lf.solo(), lf.layout(tiny(), lf.Mesh(dp=1)), MAKES["groups"](), 3)
    assert state.keys() == {"master", "m", "v", "t.0", "t.1"}
    assert int(state["t.0"]["t"]) == int(state["t.1"]["t"]) == 2  # of three updates one is skipped
    assert dict(tree.items(state["m"])).keys() == dict(tree.items(state["master"])).keys()


def test_a_predicate_that_takes_nothing_is_refused() -> None:
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    layouts = joined(layout)
    for choices, words in (
        ([lambda param: "expert" in param.axes], "group 0 of the optimizer, <lambda>, takes none of the 18 trained parameters; leave it out"),
        ([is_norm, is_norm], "group 1 of the optimizer, is_norm, takes none of the 18 trained parameters that the groups before it have left"),
    ):
        with pytest.raises(lf.config.ConfigError, match=words):
            optim.groups([(takes, optim.sgd(LR)) for takes in choices], optim.sgd(LR)).init({}, torch.device("cpu"), layouts)


def test_the_average_of_the_weights() -> None:
    layout = lf.layout(tiny(), lf.Mesh.parse("tp=2"))
    layouts = joined(layout)
    states = [lf.sim.spmd(layout.mesh, updated, layout, optim.ema(optim.muon(LR), 0.75), n) for n in (1, 2, 3)]
    for rank in range(2):
        want = dict(tree.items(cut(layouts, rank, wholes(layouts, "w"))))
        for i in (0, 2):  # the second update is skipped
            want = {path: 0.75 * e + 0.25 * tree.get(states[i][rank]["master"], path) for path, e in want.items()}
        for path, e in want.items():
            torch.testing.assert_close(tree.get(states[2][rank]["ema"], path), e, rtol=1e-13, atol=1e-13, msg=path)
            assert torch.equal(tree.get(states[1][rank]["ema"], path), tree.get(states[0][rank]["ema"], path)), path
    with pytest.raises(lf.config.ConfigError, match=r"decay=1\.0 of an average"):
        optim.ema(optim.sgd(LR), 1.0)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("name", [n for n in MAKES if n != "sgd"])
def test_state_in_the_host_s_memory_changes_no_bit(name: str, share: float) -> None:
    layout = lf.layout(tiny_moe(), lf.Mesh.parse("pp=2,tp=2"), sharding="0")
    plain = lf.sim.spmd(layout.mesh, updated, layout, MAKES[name](), 3, 0.5, "fp32")
    there = lf.sim.spmd(layout.mesh, updated, layout, optim.on_host(MAKES[name](), share), 3, 0.5, "fp32")
    for a, b in zip(plain, there):
        assert [*a] == [*b]
        for path, x in tree.items(a):
            assert torch.equal(tree.get(b, path), x), path


def test_state_in_the_host_s_memory_of_several_chains() -> None:
    """Ranks of one chain agree on which layers' state lies there, whatever else they are on."""
    layouts = laid_out(at("tp=2,dp=2", "tp=3", "dp=2", ranks={"words": (1, 3, 0), "hand": (2, 3)}))
    mesh = lf.Mesh(dp=layouts.world)
    plain, there = (lf.sim.spmd(mesh, updated, layouts, o, 2) for o in (optim.muon(LR), optim.on_host(optim.muon(LR), 0.5)))
    for a, b in zip(plain, there):
        for path, x in tree.items(a):
            torch.testing.assert_close(tree.get(b, path), x, rtol=1e-12, atol=1e-12, msg=path)
    with pytest.raises(lf.config.ConfigError, match=r"share=0\.0 of the optimizer's state"):
        optim.on_host(optim.sgd(LR), 0.0)


def test_at_most_two_layers_are_on_the_device_and_each_copy_waits_for_its_buffer() -> None:
    """What is asked of the device, in order: layer i+1 is fetched before layer i is updated, and only after i-1 is out."""
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    layouts, cpu, said = joined(layout), lf.devices.get("cpu"), list[str]()

    def copy_beside(pairs: Any, way: int, after: Any, streams: Any) -> Any:
        after()
        (name,) = {path for path, x in tree.items(state["m"]) for pair in pairs for y in pair if y is x and x.numel()} & firsts
        said.append(f"{'in' if way else 'out'} {name.split('/')[0]}")
        for to, source in pairs:
            to.copy_(source)
        return lambda: said.append(f"wait {'in' if way else 'out'} {name.split('/')[0]}")

    class Device:
        def __getattr__(self, name: str) -> Any:
            return copy_beside if name == "copy_beside" else getattr(cpu, name)

    base = optim.adamw(LR)

    def seen(state: Any, grads: Any, params: dict[str, Param], *rest: Any) -> Any:
        said.extend([f"update {next(iter(params)).split('/')[0]}"] if params else [])
        return base.update(state, grads, params, *rest)

    optimizer = optim.on_host(optim.Optimizer(base.init, seen, base.lr))
    state = optimizer.init(cut(layouts, 0, wholes(layouts, "w")), torch.device("cpu"), layouts)
    params = {path: spec.param for path, spec in layouts.specs.items()}
    segments = [*dict.fromkeys(path.split("/")[0] for path in params)]
    firsts = {next(path for path in params if path.startswith(f"{name}/")) for name in segments}
    ctx = lf.Context(lf.solo(), Device(), "fp64", ops=lf.devices.op_table(cpu))  # type: ignore[arg-type]
    grads = cut(layouts, 0, wholes(layouts, "g"))
    optimizer.update(state, grads, params, torch.tensor(LR), torch.tensor(1.0), torch.tensor(0), torch.tensor(True), ctx, layouts)
    a, b, c = segments[:3]
    assert said[:11] == [
        f"in {a}", f"in {b}", f"wait in {a}", f"update {a}", f"out {a}",
        f"wait out {a}", f"in {c}", f"wait in {b}", f"update {b}", f"out {b}", f"wait out {b}",
    ]  # fmt: skip
    assert said[-2:] == [f"wait out {name}" for name in sorted(segments[-2:], key=lambda name: segments.index(name) % 2)]



@pytest.mark.parametrize("other", [("ep=2,dp=4", "2,ranks=2"), ("pp=2,tp=2", "0")], ids=str)
def test_state_goes_on_under_another_layout(other: tuple[str, str], tmp_path: Path) -> None:
    """And the average of the weights can be read by itself."""
    make = partial(optim.ema, optim.muon(LR, way="gathered"), 0.75)
    (one,) = lf.sim.spmd(lf.Mesh(dp=1), updated, whole(), make(), 4)
    (half,) = lf.sim.spmd(lf.Mesh(dp=1), updated, whole(), make(), 2)

    def save(axes: Any, layout: lf.layouts.Layout) -> None:
        state, fresh = updated(axes, layout, make(), 2), lf.init(layout, context(axes), 0)  # of what is not trained there are masters, too
        state["master"] = tree.build([*{**dict(tree.items(fresh)), **dict(tree.items(state["master"]))}.items()])
        lf.checkpoint.save(tmp_path / "c", layout, lf.State({}, state, torch.tensor(2)), context(axes), {})

    def go_on(axes: Any, layout: lf.layouts.Layout) -> tree.Tree:
        state, _ = lf.checkpoint.load(tmp_path / "c", layout, context(axes))
        for averaged, kind in ((False, "master"), (True, "ema")):
            with lf.checkpoint.masters(tmp_path / "c", layout, context(axes), averaged) as read:
                for path in joined(layout).trained(axes.rank):
                    assert torch.equal(read(path), tree.get(state.optimizer[kind], path))
        return updated(axes, layout, make(), 4, start=(2, state.optimizer))

    first = lf.layout(tiny_moe(), lf.Mesh.parse("tp=2,dp=2"), sharding="1")
    lf.sim.spmd(first.mesh, save, first)
    layout = lf.layout(tiny_moe(), lf.Mesh.parse(other[0]), sharding=other[1])
    states = lf.sim.spmd(layout.mesh, go_on, layout)
    for kind in ("master", "momentum", "ema", "m"):
        held = {path: x for path, x in tree.items(one[kind]) if path not in layout.frozen}
        want = pieces_of(whole(), {kind: tree.build([*held.items()])}, kind)
        mine = [{kind: tree.build([(p, x) for p, x in tree.items(state[kind]) if p not in layout.frozen])} for state in states]
        agree(layout, mine, kind, want, 1e-11)
    assert not torch.equal(one["ema"]["head"]["norm"], half["ema"]["head"]["norm"])


def test_a_checkpoint_without_an_average_says_so(tmp_path: Path) -> None:
    layout, ctx = lf.layout(tiny(), lf.Mesh(dp=1)), context(lf.solo())
    lf.checkpoint.save(tmp_path / "c", layout, lf.State({}, updated(lf.solo(), layout, optim.sgd(LR), 1), torch.tensor(1)), ctx, {})
    with (
        pytest.raises(lf.checkpoint.CheckpointError, match="has no average of the weights: its run was made without --ema"),
        lf.checkpoint.masters(tmp_path / "c", layout, ctx, averaged=True),
    ):
        pass


def test_words_of_the_scripts() -> None:
    rate = optim.constant(LR)
    layout = lf.layout(tiny(), lf.Mesh(dp=1))
    for asked, kinds in (
        ({"name": "adamw"}, {"master", "m", "v", "t"}),
        ({"name": "sgd", "ema": 0.9, "offload": 1.0}, {"master", "ema"}),
        ({"name": "muon", "moments": "bf16", "muon_way": "gathered"}, {"master", "momentum", "m", "v", "t.1"}),
    ):
        state = updated(lf.solo(), layout, optim.named(rate=rate, **asked), 1, 0.5, "fp32")  # type: ignore[arg-type]
        assert state.keys() == kinds
        if "moments" in asked:
            assert {x.dtype for kind in ("momentum", "m", "v") for x in tree.leaves(state[kind])} == {torch.bfloat16}
    for wrong, words in (
        ({"name": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"name": "adamw", "muon_way": "owner"}, "muon_way='owner' is of Muon, and the optimizer is adamw"),
        ({"name": "sgd", "moments": "bf16"}, "moments='bf16': sgd has none"),
        ({"name": "sgd", "offload": 1.0}, r"offload=1\.0: sgd keeps nothing but the weights"),
        ({"name": "adamw", "ema": 1.5}, r"decay=1\.5 of an average of the weights must lie between 0 and 1"),
    ):
        with pytest.raises(lf.config.ConfigError, match=words):
            optim.named(rate=rate, **wrong)  # type: ignore[arg-type]


def test_what_lies_in_the_host_s_memory_does_not_count_against_the_device_and_is_loaded_there(tmp_path: Path) -> None:
    layout, cpu = lf.layout(tiny(), lf.Mesh(dp=1)), lf.devices.get("cpu")
    trained = [*layout.specs]
    size = sum(math.prod(spec.param.shape) for spec in layout.specs.values())
    card = SimpleNamespace(**{**vars(cpu), "torch_device": lambda rank: torch.device("meta"), "memory_total": lambda: size * 8 + 8})
    ctx = lf.Context(lf.solo(), card, "fp32", ops=lf.devices.op_table(cpu))  # type: ignore[arg-type]
    base = optim.ema(optim.adamw(LR), 0.9)
    memory.refuse_what_cannot_fit(layout, optim.on_host(base), ctx)  # masters and gradients fit
    for optimizer in (base, optim.on_host(base, 0.5)):
        with pytest.raises(OutOfMemory, match="out of memory before the first step"):
            memory.refuse_what_cannot_fit(layout, optimizer, ctx)
    layouts = joined(layout)
    assert optim.on_host(base).hosted(trained, layouts) == {*trained}
    norms = optim.groups([(is_norm, optim.on_host(base))], optim.sgd(LR)).hosted(trained, layouts)
    assert norms == {path for path in trained if is_norm(layout.specs[path].param)}

    here = context(lf.solo(), "fp32")
    state = lf.State({}, updated(lf.solo(), layout, base, 1, 0.5, "fp32"), torch.tensor(1))
    lf.checkpoint.save(tmp_path / "c", layout, state, here, {})
    loaded, _ = lf.checkpoint.load(tmp_path / "c", layout, here, optim.on_host(base).hosted)
    assert all(torch.equal(tree.get(loaded.optimizer, path), x) for path, x in tree.items(state.optimizer))
    found = {}  # where each comes to lie
    for leaf in ("master/embed/weight", "m/embed/weight", "m/head/norm"):
        about = (SimpleNamespace(tensors={leaf: SimpleNamespace(dtype="F32")}), {leaf: []})
        with patch.object(torch.Tensor, "pin_memory", lambda x: "pinned"), patch.object(native, "device_of", lambda ctx: torch.device("meta")):
            x = native._leaf(about, leaf, layouts, here, {"embed/weight"})  # type: ignore[arg-type]
        found[leaf] = x if isinstance(x, str) else x.device.type
    assert found == {"master/embed/weight": "meta", "m/embed/weight": "pinned", "m/head/norm": "meta"}
