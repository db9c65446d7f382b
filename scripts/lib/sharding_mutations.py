"""What scripts/mutate breaks of state that lies in shards: who keeps what, sums into shards, parameters made whole, programs and their proof."""

from __future__ import annotations

from mutation import words

from lf import axes, drift, layouts, sharding, state
from lf.axis import Axis
from lf.parallel import reduce
from lf.schedule import shard, sums
from lf.schedule.gathered import Gathered
from lf.schedule.gradients import Gradients
from lf.schedule.holds import Holds
from lf.schedule.lower import each_microbatch
from lf.schedule.run import _Rank
from lf.sharding import Cut
from lf.spec import Spec

FILE = "tests/test_sharding.py"
KINDS, MESH, OFTEN = f"{FILE}::test_law_1_of_each_kind", f"{FILE}::test_law_1_on_a_mesh", f"{FILE}::test_how_often_a_layer_travels"
AHEAD, GONE = f"{FILE}::test_a_layer_is_gathered_so_many_layers_before_its_use", f"{FILE}::test_weights_are_gone_between_uses"
ALONE = f"{FILE}::test_law_1_of_experts_that_no_other_rank_has"
FLEW = f"{FILE}::test_whole_gradients_are_gone_when_most_activations_are_there"
NARROW = f"{FILE}::test_what_travels_in_bfloat16_is_added_in_float32"
SHARDS = "tests/test_shards.py"
COVERED, MANY = f"{SHARDS}::test_every_element_is_kept_and_counted_once", f"{SHARDS}::test_many_tensors_in_one_launch"
CHECK, DRIFT = "tests/schedule/test_check_sharded.py", "tests/test_drift.py::test_one_bit_of_a_shard_is_found"

SHARDING = [
    words("shards: those of the next rank", KINDS, (Spec.shard, "at % self.cut.n, at // self.cut.n", "(at + 1) % self.cut.n, at // self.cut.n")),
    words("shards: every group counts", COVERED, (Spec.state_owned, "if self.shard(coords)[1]:", "if False:")),
    words("shards: what tp holds alike counts twice", COVERED, (Spec.state_owned, "(owned := first.get(piece.key)) is None", "not (owned := piece)")),
    words("shards: rows that are left over", SHARDS, (Cut.bounds, "(shard + 1) * rows // self.n", "(shard + 1) * (rows // self.n)")),
    words("shards: the first owns all small tensors", SHARDS, (layouts._cut, "each.index(min(each))", "0")),
    words("shards: what is not learned, too", f"{FILE}::test_law_1_of_mixtures", (layouts._cut, "spec.param.learned and ", "")),
    words("shards: over all ranks, whatever was asked", SHARDS, (sharding.shard_count, "return sharding.ranks", "return ranks")),
    words("shards: neighbours as groups between", SHARDS, (axes.parted, "axis.ranks[axis.index % n :: n]", "axis.ranks[first : first + n]")),
    words("gather many: rows of the next rank", MANY, (Axis._unpack, "self._by_place(packed.chunk(self.size))", "packed.chunk(self.size)[::-1]")),
    words("scatter many: rows of the last rank first", MANY, (Axis._pack, "self._by_place(packed)", "self._by_place(packed.flip(0))")),
    words("scatter: not summed over the groups", KINDS, (reduce._scattered, "outer.sum_many([shards[spec.path] for spec in specs])", "pass")),
    words("scatter: not summed over tp", MESH, (reduce._scattered, "a not in spec.cut.axes", "False")),
    words("scatter: summed over all once more", KINDS, (reduce._scattered, "a not in spec.cut.axes", "True")),
    words("scatter: added up in bfloat16", NARROW, (reduce._narrow, ".sum(0, dtype=shard.dtype)", ".sum(0)")),
    words("scatter: bfloat16 twice the first rows", NARROW, (reduce._narrow, "at += shard.numel()", "at += 0 * shard.numel() + 1")),
    words("gradients: the last microbatch alone", KINDS, (Gradients.reduce, "self.shards[path] += shard", "self.shards[path] = shard")),
    words("gradients: a microbatch counts twice", KINDS, (Gradients.opened, "buffer.zero_()", "pass"), (Gradients.add, ".copy_(g)", ".add_(g)")),
    words("gradients: of a microbatch the whole layer", ALONE, (_Rank.reduce, "if chain.layout.specs[p].cut)", "if True)")),
    words("gradients: whole ones stay on their way", FLEW, (Gradients.passed, "self.passes == 2", "False")),
    words("weights: never let go", GONE, (Gathered.release, "self.leaves[path].untyped_storage().resize_(0)", "pass")),
    words("weights: of the step before", "tests/test_train.py", (state.compute_copy, "torch._foreach_copy_(into, given)", "pass")),
    words("gather: in every stage for each use", OFTEN, (shard._spells, "stage < 3 or ", "")),
    words("gather: nothing is kept", OFTEN, (shard._spells, "(keep and open_units)", "False")),
    words("gather: at its use", AHEAD, (shard._row, "spell.first - sharding.ahead", "spell.first")),
    words("reduce: once, whatever was asked", OFTEN, (each_microbatch, 'layout.sharding.reduce == "microbatch"', "False")),
    words("check: weights need not be whole", CHECK, (Holds.needs, "self.shards - self.whole", "set()")),
    words("check: whole twice", CHECK, (Holds.gather, "if layer in self.whole:", "if False:")),
    words("check: sums of some microbatches", CHECK, (sums._missing, "[attrs.evolve(whole, microbatch=u) for u in here]", "[]")),
    words("check: a sum before its gradients", CHECK, (sums.reduce, "and a.microbatch in (None, u)]", "and a.microbatch is None]")),
    words("drift: shards are one box", DRIFT, (drift._atoms, "at += spec.shard(coords)[0] * (places := places // shards)", "pass")),
    words("drift: ends of shards are not looked at", DRIFT, (drift._ends, "cut is not None and cut.dim", "cut is None and cut.dim")),
]
