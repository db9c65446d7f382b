"""What scripts/mutate breaks of mixtures of experts."""

from __future__ import annotations

from mutation import words

from lf import agreement, train
from lf.models import moe, mtp, replay, router
from lf.parallel import expert, redistribute
from lf.schedule.graphs import Graphs
from lf.spec import Param, Spec

LAW = "tests/test_moe.py::test_law_1_of_each_router"
COPIES = "tests/test_moe.py::test_law_1_where_other_ranks_have_the_same_experts"
AGAINST = "tests/test_moe.py::test_the_bias_moves_against_the_load_and_the_fraction_is_the_load"
NOTHING = "tests/test_moe.py::test_a_step_that_is_not_finite_moves_nothing"
WIDE = "tests/test_moe.py::test_the_bias_stays_wide_in_bf16"
ROUTER = "tests/models/test_router.py"
MTP = "tests/models/test_mtp.py"
REPLAY = "tests/models/test_replay.py"

SUM_AXES = Spec.__dict__["sum_axes"].fget

MIXTURES = [
    words("experts: gradients summed over ep, too", LAW, (SUM_AXES, "a not in self.names", "(a not in self.names or a == 'ep')")),
    words("experts: gradients summed over etp, too", LAW, (SUM_AXES, "a not in self.names", "(a not in self.names or a == 'etp')")),
    words("experts: gradients not summed over edp", COPIES, (SUM_AXES, "a not in self.names", "a not in self.names and a != 'edp'")),
    words("experts: biases not summed over etp", LAW, (SUM_AXES, "a not in self.names", "a not in self.names and a != 'etp'")),
    words("experts: the bias out once for each rank of etp", LAW, (moe.experts_block, 'ctx.axes["etp"], R, P', 'ctx.axes["etp"], P, R')),
    words("dispatch: rows of the wrong expert", LAW, (expert.sorted_by_expert, "lengths = blocks.T.", "lengths = blocks.T.flip(0).")),
    words("dispatch: a token for each row", LAW, (expert.send_by_exchange, "h_tD, order, k), send", "h_tD, order.flip(0), k), send")),
    words("combine: the weight of another choice", LAW, (expert.back_by_exchange, "c[\"order\"], weights_tk)", "c[\"order\"], weights_tk.flip(1))")),
    words("gather: experts of the next rank", LAW, (expert.send_by_gather, "bounds(ep.index, ep.size)", "bounds((ep.index + 1) % ep.size, ep.size)")),
    words("gather: the weight of another choice", LAW, (expert.back_by_gather, "c[\"weights\"])", "c[\"weights\"].flip(1))")),
    words(
        "exchange later backward: counts not swapped",
        LAW,
        (redistribute.exchange_later, "(dy, recv_rows, send_rows, later=True)", "(dy, send_rows, recv_rows, later=True)"),
    ),
    words(
        "exchange later backward: a mean",
        LAW,
        (redistribute.exchange_later, "axis.all_to_all(dy, recv_rows", "axis.all_to_all(dy / axis.size, recv_rows"),
    ),
    words("balance: tokens of this rank alone", LAW, (router._losses, "shards.sum(load_E)", "load_E")),
    words(
        "sequence balance: tokens of this rank alone",
        LAW,
        (router._losses, "shards.sum(tally(pair, n * r.experts))", "tally(pair, n * r.experts)"),
    ),
    words("sequence balance: every token weighs as much", ROUTER, (router._losses, "(f_nE / length_n)[document_t]", "f_nE[document_t]")),
    words("balance: shares of the chosen alone", ROUTER, (router._losses, '(share_tE * f_E).sum()', '(share_tE * (share_tE > 0.2) * f_E).sum()')),
    words("global balance: of this step", ROUTER, (router._losses, 'p["fraction"].to(dtype)', "(load_E / load_E.sum().clamp_min(1)).to(dtype)")),
    words("z: logits, not their squares", ROUTER, (router._losses, "logits_tE.logsumexp(-1).square()", "logits_tE.logsumexp(-1)")),
    words("router: padding counts", (LAW, ROUTER), (router._labelled, "> 0", ">= 0")),
    words("router: weights with the bias", ROUTER, (router.route, "= score_tE.gather(1, at_tk)", "= (score_tE + p['bias']).gather(1, at_tk)")),
    words("router: a choice without the bias", ROUTER, (router.choose, "score_tE + bias_E", "score_tE")),
    words("router: a group scores as its best expert", ROUTER, (router.choose, "by_tgm.topk(2, -1).values.sum(-1)", "by_tgm.amax(-1)")),
    words("router: the worst groups", ROUTER, (router.choose, "best_tg.topk(r.top_groups, -1)", "best_tg.topk(r.top_groups, -1, largest=False)")),
    words("router: no scale", ROUTER, (router.route, "weights_tk = weights_tk * r.scale", "pass")),
    words("router: in the dtype of the tokens", ROUTER, (router.route, "dtype = wide(h_tD.dtype)", "dtype = h_tD.dtype")),
    words("capacity: a queue for each rank", LAW, (router.within_capacity, "starts = F.pad(counts", "starts = F.pad((counts / group.size).long()")),
    words("capacity: the lowest weights stay", ROUTER, (router.within_capacity, "descending=True", "descending=False")),
    words("capacity: rounding orders equal weights", ROUTER, (router.within_capacity, "weights.float().argsort", "weights.argsort")),
    words("capacity: one more", ROUTER, (router.within_capacity, "place < limit", "place <= limit")),
    words("bias: towards the load", AGAINST, (moe.moe_state, "load.mean() - load", "load - load.mean()")),
    words("bias: moves in a step that is not made", NOTHING, (train._after_step, "torch.where(ok, new, mine[path])", "new")),
    words("sums: twice as many", "tests/test_experts.py", (train._world_sums, "(x.view(shape) for x", "(x.view(shape) * 2 for x")),
    words("bias: in the compute dtype", WIDE, (Param.used_in, "compute if self.learned else torch.promote_types(compute, torch.float32)", "compute")),
    words("replay: the choices of another layer", REPLAY, (replay._chosen, "[:, i]", "[:, i - 1]")),
    words("replay: its own choices", REPLAY, (router.route, 'if "choices" in batch.derived else None', "if False else None")),
    words("replay: nobody is dropped", REPLAY, (router.route, "else given_tk < 0\n", "else given_tk < -99\n")),
    words("agreement: counts may differ", "tests/test_agreement.py", (agreement.rounded, "q if q.name in exact else attrs", "attrs")),
    words("agreement: any tolerance", REPLAY, (agreement.rounded, "min(TIMES * worst[kind(q)], MOST)", "2.0")),
    words("mtp: the next token", MTP, (mtp.enter_block, "k + 1, batch, 0", "k, batch, 0")),
    words("mtp: the label of the next token", MTP, (mtp.leave_block, "k + 1, batch, IGNORE", "k, batch, IGNORE")),
    words("mtp: tokens of the next document", MTP, (mtp.ahead, "later.where(there == document, fill)", "later")),
    words("graphs: a table that is also multiplied counts twice", MTP, (Graphs.back, " if path not in piece.leaves]", "]")),
]
