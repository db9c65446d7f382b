"""How the state of a model lies over the ranks that see other data: who keeps which part of masters, moments, gradients and parameters.

A parameter that d ranks hold alike (dp·cp of them; of experts edp) can have its state cut into n shards, n = d or, hybrid, a divisor of it. Then
each of n neighbours keeps one shard of everything, and the program of a step makes parameters whole where they are used. The stages are those of
ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054 §5); bytes of a parameter and rank that last through a step, with m bytes of optimizer state:

    stage   parameters            gradients                                     optimizer
    0       2, whole              4, whole                                      m
    1       2 whole in a step     4 whole until they are summed, once a step    m/n
    2       2 whole in a step     4/n, summed after each microbatch             m/n
    3       2/n, whole in use     4/n, summed after each microbatch             m/n
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from lf.config import ConfigError, one_of
from lf.mesh import shares

STAGES = {0: "everything on every rank", 1: "optimizer state in shards", 2: "and gradients", 3: "and parameters"}
REDUCE = ("step", "microbatch")
TRANSPORT = ("fp32", "bf16")


@attrs.frozen
class Sharding:
    """`stage`: 0 to 3, see STAGES · `ranks`: shards over so many neighbouring ranks of the data group, the same again on the others (None: over all;
    of experts over the greatest common divisor of this and edp) · `reduce`: gradients are summed once a "step", or after each "microbatch" (default:
    from stage 2 on); which takes as many sums as there are microbatches, and no whole gradient lasts · `keep`: of stage 3, parameters stay from
    the forward of a microbatch to its backward · `ahead`: how many layers before its use one is gathered · `transport`: gradients travel in at
    least this dtype; sums are made in the master dtype either way.

    Raises ConfigError for what cannot be."""

    stage: int = 0
    ranks: int | None = None
    reduce: str = attrs.field()
    keep: bool = False
    ahead: int = 1
    transport: str = "fp32"

    @reduce.default
    def _by_stage(self) -> str:
        return REDUCE[self.stage in (2, 3)]

    def __attrs_post_init__(self) -> None:
        if type(self.stage) is not int or self.stage not in STAGES:
            raise ConfigError(f"sharding stage {self.stage!r}: there are " + ", ".join(f"{k} ({words})" for k, words in STAGES.items()))
        one_of("reduce of a sharding", self.reduce, REDUCE)
        one_of("transport of a sharding", self.transport, TRANSPORT)
        if self.ranks is not None and (type(self.ranks) is not int or self.ranks < 1):
            raise ConfigError(f"sharding over ranks={self.ranks!r}: must be at least 1, and a whole number")
        if type(self.keep) is not bool:
            raise ConfigError(f"sharding keep={self.keep!r}: must be True or False")
        if type(self.ahead) is not int or self.ahead < 0:
            raise ConfigError(f"sharding ahead={self.ahead!r}: must be 0 (a layer is gathered where it is used) or more")
        if self.keep and self.stage < 3:
            raise ConfigError(f"sharding keep is of stage 3: in stage {self.stage} parameters stay whole for a step anyway; leave it out")
        if not self.stage:
            given = {"ranks": self.ranks, "transport": self.transport != "fp32", "reduce": self.reduce != "step", "ahead": self.ahead != 1}
            for name, value in given.items():
                if value:
                    raise ConfigError(f"sharding {name} is of stages 1 to 3; stage 0 keeps everything on every rank: leave it out")

    @staticmethod
    def parse(text: str | Sharding) -> Sharding:
        """'3,ranks=8,reduce=step,keep,ahead=2,transport=bf16' → Sharding. Raises ConfigError that names the word it could not read."""
        if isinstance(text, Sharding):
            return text
        if not isinstance(text, str):
            raise ConfigError(f"sharding={text!r}: give a Sharding, or its words, as '3,ranks=8'")
        first, *rest = [w.strip() for w in text.split(",")]
        known = ("ranks", "reduce", "keep", "ahead", "transport")
        if not _number(first):
            raise ConfigError(f"sharding {text!r}: it begins with a stage, 0 to 3, as in 3,ranks=8; {first!r} is none")
        given: dict[str, object] = {}
        for word in rest:
            name, eq, value = (w.strip() for w in word.partition("="))
            one_of(f"word in sharding {text!r}:", name, known)
            if name in given:
                raise ConfigError(f"sharding {text!r}: {name} stands twice")
            form = {"keep": "keep", "ranks": "ranks=N", "ahead": "ahead=N"}.get(name, f"{name}=NAME")
            if bool(eq) == (name == "keep") or (form.endswith("=N") and not _number(value)):
                raise ConfigError(f"sharding {text!r}: {word!r} should read {form}")
            given[name] = True if name == "keep" else int(value) if name in ("ranks", "ahead") else value
        return Sharding(int(first), **given)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """What `parse` reads."""
        words = [str(self.stage)]
        words += [f"ranks={self.ranks}"] if self.ranks is not None else []
        words += [f"reduce={self.reduce}"] if self.reduce != REDUCE[self.stage >= 2] else []
        words += ["keep"] if self.keep else []
        words += [f"ahead={self.ahead}"] if self.ahead != 1 else []
        words += [f"transport={self.transport}"] if self.transport != "fp32" else []
        return ",".join(words)


def _number(word: str) -> bool:
    return word.isascii() and word.isdecimal()


NONE = Sharding()
"""Everything on every rank."""


@attrs.frozen
class Cut:
    """State in `n` shards along tensor dim `dim`, each part by itself where that is the dim of the parts; or, `dim` None, whole on shard `owner`: too
    few rows. `axes`: of the group of ranks that hold the parameter alike, n neighbours share it."""

    axes: tuple[str, ...]
    n: int
    dim: int | None
    owner: int = 0

    def sizes(self, rows: int) -> tuple[int, ...]:
        """How many of so many rows (along `dim`, or 0) each shard has."""
        return shares(rows, self.n) if self.dim is not None else tuple(rows * (k == self.owner) for k in range(self.n))

    def bounds(self, rows: int, shard: int) -> tuple[int, int]:
        """The rows [start, stop) of a shard."""
        if self.dim is None:
            return (0, rows) if shard == self.owner else (0, 0)
        return shard * rows // self.n, (shard + 1) * rows // self.n


def cut_dim(lengths: Sequence[Sequence[int]], n: int) -> int | None:
    """The dim to cut into n: lengths[d] are those of all pieces along dim d, on all ranks. The first that n divides on all; else the first where
    shares differ by an eighth at most; else the longest, if it has n rows; else None.

    A cut of dim 0 travels as it lies; others are packed on the way."""
    least = [min(each, default=0) for each in lengths]
    for d, each in enumerate(lengths):
        if least[d] >= n and all(k % n == 0 for k in each):
            return d
    for d, k in enumerate(least):
        if k >= 8 * n:
            return d
    longest = max(range(len(least)), key=lambda d: least[d], default=None)
    return longest if longest is not None and least[longest] >= n else None


def shard_count(sharding: Sharding, ranks: int, experts: bool) -> int:
    """In how many shards the state is that so many ranks hold alike. Raises ConfigError where `Sharding.ranks` does not divide them."""
    if sharding.stage == 0 or sharding.ranks is None:
        return ranks if sharding.stage else 1
    if experts:
        return math.gcd(sharding.ranks, ranks)
    if ranks % sharding.ranks:
        raise ConfigError(f"sharding over ranks={sharding.ranks}: it must divide the dp·cp = {ranks} ranks that hold the same parameters")
    return sharding.ranks
