"""What scripts/mutate breaks of optimizers."""

from __future__ import annotations

from mutation import words

from lf.ops import adamw, muon, newton_schulz, rounding
from lf.optim import gathered, matrices, moments, owners
from lf.optim import muon as muon_optimizer
from lf.optim.ema import ema
from lf.optim.groups import groups
from lf.optim.on_host import _dealt, on_host

MUON = "tests/optim/test_muon.py::test_muon_is_torch_muon_under_any_layout"
OWNED = "tests/optim/test_muon.py::test_operations_are_dealt_evenly_and_each_matrix_has_one_owner"
CHAINS = "tests/optim/test_muon.py::test_muon_of_several_chains"
BF16 = "tests/optim/test_optimizers.py::test_moments_in_bf16_are_the_same_to_the_bit_under_any_layout"
MOVES = "tests/optim/test_optimizers.py::test_an_average_moves_by_chance_and_stands_still_to_the_nearest"
SKIPPED = "tests/optim/test_optimizers.py::test_a_skipped_update_leaves_every_bit"
AVERAGE = "tests/optim/test_optimizers.py::test_the_average_of_the_weights"
HOST = "tests/optim/test_optimizers.py::test_state_in_the_host_s_memory_changes_no_bit"
ORDER = "tests/optim/test_optimizers.py::test_at_most_two_layers_are_on_the_device_and_each_copy_waits_for_its_buffer"
SEVERAL = "tests/optim/test_optimizers.py::test_state_in_the_host_s_memory_of_several_chains"
GROUPS = "tests/optim/test_optimizers.py::test_each_group_has_its_rate_and_decay"
COUNTED = "tests/optim/test_optimizers.py::test_groups_of_one_kind_count_their_updates_apart"
ROUNDING = "tests/ops/test_rounding.py"

OPTIMIZERS = [
    words("muon: boxes at the corner", MUON, (gathered._finish, "whole[:, r0:r1, c0:c1] = ", "whole[:, : r1 - r0, : c1 - c0] = ")),
    words("muon: the next rank's shards", MUON, (gathered._bunches, "at = next(j for", "at = (len(there) > 1) and next(len(there) - 1 - j for")),
    words("muon: a share is the whole", MUON, (matrices.split_by, "if a in names and spec.mesh[a] > 1", "if a in names and spec.mesh[a] > 9")),
    words("muon: the experts of another", MUON, (owners._run, "unit.e - stack(piece)[0]", "stack(piece)[1] - 1 - unit.e")),
    words("muon: boxes of the owner", MUON, (owners._run, "done[id(unit)][r0:r1, c0:c1]", "done[id(unit)][: r1 - r0, : c1 - c0]")),
    words("muon: one rank makes all", OWNED, (owners._dealt, "key=lambda place: (load[place], place)", "key=lambda place: place")),
    words("muon: chains gather across each other", CHAINS, (gathered._bunches, "out.setdefault(chain, [])", 'out.setdefault("", [])')),
    words("muon: as long as the shorter side", MUON, (muon_optimizer, "math.sqrt(max(piece.shape[-2:]))", "math.sqrt(min(piece.shape[-2:]))")),
    words("muon: as long as the share", MUON, (muon_optimizer, "math.sqrt(max(piece.shape[-2:]))", "math.sqrt(max(o.shape[-2:]))")),
    words("muon: no decay", MUON, (muon_optimizer, "* o.to(w.dtype) + weight_decay * w", "* o.to(w.dtype)")),
    words("muon: no look ahead", MUON, (muon.momentum_update, "g.lerp(new, beta) if nesterov else new", "new")),
    words("muon: momentum of a skipped step", SKIPPED, (muon.momentum_update, "ok.to(g.dtype) * (1 - beta)", "1 - beta")),
    words("newton-schulz: a round less", "tests/optim/test_muon.py", (newton_schulz.newton_schulz, "range(rounds)", "range(rounds - 1)")),
    words("newton-schulz: the norm of all of a stack", MUON, (newton_schulz.newton_schulz, "dim=(-2, -1), keepdim", "dim=(-3, -2, -1), keepdim")),
    words("rounding: the place in the shard", (ROUNDING, BF16), (rounding.chunks, "lo = piece.box[0][0] + at", "lo = at")),
    words("rounding: columns from 0", (ROUNDING, BF16), (rounding.bits, "torch.arange(*last, device", "torch.arange(last[1] - last[0], device")),
    words("rounding: all steps alike", ROUNDING, (rounding.bits, "step * -4417276706812531889 + key", "step * 0 + key")),
    words("rounding: always down", (ROUNDING, MOVES), (rounding.rounded, "noise & 0xFFFF", "noise & 0")),
    words("rounding: by half as much", (ROUNDING, MOVES), (rounding.rounded, "noise & 0xFFFF", "noise & 0x7FFF")),
    words("rounding: a seed for each rank", BF16, (moments.Moments.noise, "Noise(self.seed,", "Noise(self.seed + ctx.axes.rank,")),
    words("adamw: the square is not rounded by chance", MOVES, (adamw.adamw_update, "rounded(v, bits >> 16)", "v")),
    words("rounding: all ranks have the places of the first", BF16, (moments.Moments.noise, "ctx.axes.rank), step", "0), step")),
    words("groups: one rate", GROUPS, (groups, "lr if optimizer is rest else optimizer.lr(step)", "lr")),
    words("groups: what no predicate holds of", GROUPS, (groups, "if takes(param)), -1)", "if not takes(param)), -1)")),
    words("groups: scalars of the first group", COUNTED, (groups, 'f"{kind}.{i}" if kind in numbers', 'f"{kind}.0" if kind in numbers')),
    words("ema: of a skipped step", AVERAGE, (ema, "ok.to(w.dtype) * (1 - decay)", "1 - decay")),
    words("ema: the other way round", AVERAGE, (ema, "* (1 - decay))", "* decay)")),
    words("host: scalars go on from layer to layer", HOST, (on_host, "own = {**own, **tree.map(torch.clone, before)}", "own = {**own, **before}")),
    words("host: nothing is copied back", HOST, (on_host, "[(homes[k], views[i][k]) for k in homes], 0", "[], 0")),
    words("host: the next layer comes late", ORDER, (on_host, "            now()\n", "            fetch(i)()\n")),
    words("host: a buffer is filled before it is out", ORDER, (on_host, "1, free[i % 2], streams[0]", "1, _at_once, streams[0]")),
    words("host: shares of all chains together", SEVERAL, (_dealt, "setdefault(layouts.chain_of[path], {})", 'setdefault("", {})')),
]
