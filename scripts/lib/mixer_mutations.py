"""What scripts/mutate breaks of attention: latent, normalised over all heads, with sinks."""

from __future__ import annotations

from mutation import words

from lf.kernels import sdpa
from lf.models import attention, latent
from lf.ops import attention as twin

LATENT = "tests/models/test_latent.py"
LAW = f"{LATENT}::test_law_1"
ORACLE = f"{LATENT}::test_transformers"
OPS = "tests/ops/test_attention.py"
SCALE = latent.Latent.__dict__["scale"].fget

MIXERS = [
    words("latent: the gradient of the shared key is this rank's alone", LAW, (latent.latent_block, "tp, seq, R)", "tp, seq, R._replace(kind='I'))")),
    words("latent: the wrong pairs turn", ORACLE, (latent.halves, '"... (i two) -> ... (two i)"', '"... (i two) -> ... (i two)"')),
    words("latent: mscale once", ORACLE, (SCALE, "mscale**2", "mscale")),
    words("latent: the eps of the other norms", ORACLE, (latent.latent_block, 'p["kv_norm"], EPS', 'p["kv_norm"], eps')),
    words("latent: the scale of the nope dims", ORACLE, (SCALE, "(self.nope_dim + self.rope_dim)", "self.nope_dim")),
    words("norm of all: over this rank's heads", LAW, (attention.norm_all, "redistribute(shares_T2, tp, P, R)", "shares_T2")),
    words("norm of all: its gradient is this rank's", LAW, (attention.norm_all, "tp, P, R", "tp, P, R._replace(kind='I')")),
    words("norm of all: a shared kv head counts on each rank", LAW, (attention.norm_all, "k_wide[:, own:]", "k_wide")),
    words("sinks: those of the next head", LAW, (attention.attention_block, 'p["sinks"] if', 'p["sinks"].roll(1) if')),
    words("sinks: give something", (OPS, ORACLE), (twin.attention, ".softmax(-1)[..., :tokens]", "[..., :tokens].softmax(-1)")),
    words("sinks: the output as without", OPS, (sdpa._Sunk.forward, "(before - z).exp()", "(before - before).exp()")),
    words("sinks: the kernel's backward as without", OPS, (sdpa._Sunk.forward, "bias, y, z)", "bias, y, before)")),
    words("sinks: their gradient the other way", OPS, (sdpa._sunk, "-((", "((")),
    words("attention: the scale of the values", OPS, (twin.attention, "dim**-0.5 if", "v_tke.shape[2] ** -0.5 if")),
]
