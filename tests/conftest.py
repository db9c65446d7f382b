"""Every test runs on one thread with known seeds; what is sampled is sampled by LF_TEST_SEED, printed at the top."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("LF_TEST_SEED", str(random.SystemRandom().randrange(10**6)))  # set before workers start: they sample alike
settings.register_profile("lf", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("lf")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # before the first parallel region: forked children inherit no thread pool


def pytest_report_header(config: pytest.Config) -> str:
    return f"sampling seed: LF_TEST_SEED={os.environ['LF_TEST_SEED']}"


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
