"""What tests of whole runs have in common: texts of a few words, and a training that a signal ends."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from helpers import ROOT

import lf

sys.path.insert(0, str(ROOT / "scripts"))
import pretrain

WORDS = ["def", "return", "self", "import", "yield", "lambda", "x", "y", "(", ")", ":", "\n"]


def texts(folder: Path, suffix: str = ".txt") -> Path:
    """A folder with twenty files of random words, always the same; returned."""
    dice = random.Random(0)
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}{suffix}").write_text(" ".join(dice.choices(WORDS, k=120)))
    return folder


def train(axes: Any, config: pretrain.Config, end: int | None = None) -> None:
    """`end`: a signal asks it to end while it makes the batches of this step."""
    batches, calls = lf.data.step_batches, []

    def signalled(*args: Any) -> list[lf.Batch]:
        calls.append(args)
        if len(calls) == end and axes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(*args)

    lf.data.step_batches = signalled  # in this process alone
    pretrain.main(config)
