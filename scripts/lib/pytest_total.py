"""Says, above pytest's own closing line, how long scripts/test took in all and which check before the tests failed."""

from __future__ import annotations

import os
import time
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    took = time.time() - float(os.environ["LF_TEST_BEGAN"])
    terminalreporter.write_line(f"scripts/test took {took:.0f} s in all")
    if failed := os.environ.get("LF_TEST_FAILED"):
        terminalreporter.write_line(f"FAILED before the tests: {failed} (see the top)", red=True)
