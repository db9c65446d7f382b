"""What scripts/mutate breaks in programs: generators, passes, the proof, cost and the interpreter."""

from __future__ import annotations

from mutation import words

from lf.schedule import ended, sums
from lf.schedule.bind import _piece
from lf.schedule.check import _Proof
from lf.schedule.generate import laps, one_f_one_b
from lf.schedule.gradients import Gradients
from lf.schedule.graphs import Graphs
from lf.schedule.holds import Holds
from lf.schedule.keep import _moved, recompute
from lf.schedule.lower import _by_layers, _last_of, _with_reductions, reduced_layers, tied_paths, trainable
from lf.schedule.move import _Walk, free
from lf.schedule.names import check_names
from lf.schedule.pieces import Stage, _walked
from lf.schedule.run import _add_terms, _Rank
from lf.schedule.zero_bubble import zb_h1

CHECK, RUN, PIPELINE = "tests/schedule/test_check.py", "tests/schedule/test_run.py", "tests/test_pipeline.py"
GENERATE = "tests/schedule/test_generate.py"

PASSES = [
    words(
        "reduce: a layer's sum is left out",
        CHECK,
        (_with_reductions, "reversed(reduced_layers(layout, pp).items())", "[*reversed(reduced_layers(layout, pp).items())][1:]"),
    ),
    words("reduce: a tied table is not summed over its stages", CHECK, (_with_reductions, "for path in tied_paths(layout, pp)]", "for path in ()]")),
    words("reduce: before the gradients of other layers", CHECK, (_last_of, "out[m] = max(at, out.get(m, -1))", "out[m] = at")),
    words("reduce: what is frozen, too", CHECK, (reduced_layers, "if path not in layout.frozen:", "if True:")),
    words("reduce: tied and frozen, too", CHECK, (tied_paths, "p not in layout.frozen and", "")),
    words("reduce: the last backward stays whole", CHECK, (_by_layers, 'layers.get(at) if a.op == "B" else None', "None")),
    words(
        "trainable: gradients go where nothing learns",
        CHECK,
        (_walked, "upstream, inside, fed = live, [], []", "upstream, inside, fed = True, [], []"),
    ),
    words("trainable: weight gradients of what is frozen", CHECK, (trainable, 'a.op == "B" and not inside', 'a.op == "B" and False')),
    words(
        "pieces: a backward goes on where nothing learns",
        CHECK,
        (vars(Stage)["stop"].fget, "next((i for i, wants in enumerate(zip(self.inside, self.fed)) if any(wants)), len(self.atoms))", "0"),
    ),
    words("move: a RECV before its SEND", CHECK, (_Walk.hand_on, 'self.rows[r].append(Action(f"RECV', 'self.rows[r].insert(0, Action(f"RECV')),
    words("move: gradients are not sent", CHECK, (_Walk.hand_on, '(kind == "F" or known[a.stage].upstream)', 'kind == "F"')),
    words("free: never", CHECK, (free, "*(_free(s) for waiting in sent.values() for s in waiting)", "")),
    words(
        "recompute: after the backward",
        CHECK,
        (
            recompute,
            'row.append(attrs.evolve(part, op="REMAT", ops=ops))\n            row.append(part)',
            'row += [part, attrs.evolve(part, op="REMAT", ops=ops)]\n                continue\n            row.append(part)',
        ),
    ),
    words("offload: no FETCH", CHECK, (_moved, "before.setdefault(at, [])", "[]")),
    words("offload: fetched at once", CHECK, (_moved, "max(place[back] - distance[c], place[start] + 1)", "place[start] + 1")),
]

PROOF = [
    words("check: a pair may follow from each other", CHECK, (check_names, "if _follow(*whole.pair):", "if False:")),
    words("check: an action may stand twice", CHECK, (_Proof.do, "if len(seen) == before:", "if False:")),
    words(
        "check: a deadlock is no error",
        CHECK,
        (_Proof.walk, "if stuck := {r: i for r, i in enumerate(self.at) if i < len(self.flat[r])}:", "if stuck := {}:"),
    ),
    words("check: what has arrived is not asked", CHECK, (Holds.forward, "if lo == 0 and s > 0:", "if False:")),
    words("check: forwards in any order", CHECK, (Holds.forward, "if ahead < lo:", "if False:")),
    words("check: a backward may come first", CHECK, (Holds.backward, "if self.ahead.get(key, 0) < len(stage.atoms):", "if False:")),
    words("check: the gradient that arrives is not asked", CHECK, (Holds.backward, "if s + 1 < len(self.on.known[c]) and", "if False and")),
    words(
        "check: on the host is as good as here",
        CHECK,
        (Holds.backward, "if piece.away:", "if False:"),
        (Holds.remat, "if piece.away:", "if False:"),
    ),
    words("check: not kept is as good as kept", CHECK, (Holds.backward, "if not piece.made or piece.partly:", "if False:")),
    words("check: a REDUCE may come too early", CHECK, (sums.reduce, "if late := [u for u in here if", "if late := [u for u in () if")),
    words(
        "check: a SEND of nothing",
        CHECK,
        (_Proof.message, "if not self.rows[rank].sends(a):", "if False:"),
        (Holds.send, 'self.take(f"out {a.op[-1]}", a.chain, a.stage, a.microbatch, "there is nothing to send")', "pass"),
    ),
    words("check: a RECV of another microbatch", CHECK, (_Proof.message, "or b.microbatch != a.microbatch", "")),
    words("check: values may stay", CHECK, (ended.nothing_stays, "elif row.values:", "elif False:")),
    words("check: weight gradients may be owed", CHECK, (ended.nothing_stays, "elif owed := [", "elif owed := [] and [")),
    words("check: actions may be missing", CHECK, (ended.nothing_is_missing, "if missing:", "if False:")),
    words("check: the peak is of the end", CHECK, (Holds.hold, "max(self.peak, self.held)", "self.held")),
    words("check: a tied sum before its layers", CHECK, (sums._tied, "if early:", "if False:")),
]

INTERPRETER = [
    words("run: gradients of a microbatch replace the last", RUN, (Gradients.add, "self.buffers[path] += g", "self.buffers[path].copy_(g)")),
    words("run: input gradients cut between layers", RUN, (Graphs.back, "torch.zeros_like(v) if g is None else g", "torch.zeros_like(v)")),
    words("run: losses not weighted", RUN, (Graphs.back, "self.seeds[k] for k in kept.losses", "self.seeds[k] ** 0 for k in kept.losses")),
    words(
        "run: terms of the last microbatch alone",
        RUN,
        (_add_terms, "sums[name] + value.detach() if name in sums else value.detach()", "value.detach()"),
    ),
    words("run: infinity in the backward is not seen", RUN, (_Rank.backward, "for g in dy.values() if g.numel()", "for g in ()")),
    words(
        "run: a weight gradient of one product is lost", RUN, (_Rank.weights, "for path, rows, dy in factors:", "for path, rows, dy in factors[1:]:")
    ),
    words(
        "run: what is made again counts its losses again",
        PIPELINE,
        (_Rank.remat, "pieces[i], _, _ = ", "pieces[i], _, again = "),
        (
            _Rank.remat,
            "            yield",
            '            _add_terms(self.terms, {"losses": again}) if not a.ops else None\n            yield',
        ),
    ),
    words("run: what is to be made again is kept", PIPELINE, (_Rank.forward, "if keeps and again != ():", "if keeps:")),
    words(
        "run: everything is made again from the first piece",
        PIPELINE,
        (_Rank.remat, "for k, v in kept.x.items()}", "for k, v in pieces[0].x.items()}"),
    ),
    words(
        "run: a stage's input has no gradient",
        PIPELINE,
        (_piece, "upstream = stage.upstream or any(stage.inside[:lo])", "upstream = any(stage.inside[:lo])"),
    ),
    words("run: what is frozen is learned", PIPELINE, (_piece, "if path not in layout.frozen]", "]")),
    words("run: the wrong stage's gradient is waited for", PIPELINE, (_Rank.recv, "(s + 1, s + 1)", "(s, s + 1)")),
    words(
        "run: a tied gradient stays half",
        PIPELINE,
        (_Rank.sum_over, 'mine += pipe.recv(*like, h, f"{path} part")()', 'pipe.recv(*like, h, f"{path} part")()'),
    ),
    words(
        "run: nothing is freed",
        PIPELINE,
        (_Rank.free, "self.sent.pop((a.segment, _at(a)))", "self.sent[a.segment, _at(a)]"),
    ),
    words("run: offload of nothing", RUN, (_Rank.copy, "kept.slots.offload if", "kept.slots.fetch if")),
]

GENERATORS = [  # right numbers, wasted time: only what a schedule costs shows it
    words("1f1b: one forward fewer ahead", GENERATE, (one_f_one_b, "ahead=len(placement) - 1 - s", "ahead=max(len(placement) - 2 - s, 0)")),
    words("zb-h1: weights first", GENERATE, (zb_h1, "lag=s", "lag=0")),
    words("interleaved: one more forward ahead for each rank", GENERATE, (laps, "steps * (ranks - 1 - r)", "(steps + 1) * (ranks - 1 - r)")),
]

SCHEDULE = [*PASSES, *PROOF, *INTERPRETER, *GENERATORS]
