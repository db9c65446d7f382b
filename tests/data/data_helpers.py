"""Documents in memory and texts, for the tests of data."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from lf.data import Documents

EOS = 0
WEIRD = "héllo  wörld\t\n\n\r\n , . 日本語 \u200d👩‍🚀\x00 ﷽ e\u0301 <|endoftext|> 'll \U0010ffff"


def documents(lengths: list[int], seed: int | None = None) -> Documents:
    """Document d of n tokens: ids that no other document has, then EOS. With a seed each is cut into sequences, and some are empty."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    tokens[offsets[1:] - 1] = EOS
    if seed is None:
        return Documents(tokens, offsets[:-1] * 4, np.arange(len(lengths) + 1), Path("documents"), "of a test")
    dice, places, first = random.Random(seed), [], [0]
    for begin, stop in zip(offsets.tolist(), offsets.tolist()[1:]):
        if dice.random() < 0.3:  # an empty document, of no sequence or of an empty one
            places += [begin] * dice.randint(0, 1)
            first.append(len(places))
        places += sorted([begin, *(dice.randint(begin, stop) for _ in range(dice.randint(0, 3)))])
        first.append(len(places))
    return Documents(tokens, np.array(places, np.int64) * 4, np.array(first, np.int64), Path("documents"), "of a test")


def some_text(n: int = 300, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijé", k=draw.randint(2, 8))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=draw.randint(3, 40))) for _ in range(n)]
