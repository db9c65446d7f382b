"""What scripts/test runs, in an environment that is ready: lint, types, then the tests. With pytest arguments, only those tests.

    scripts/test                    everything quick
    scripts/test --all              every sweep in full, too
    scripts/test tests/test_mesh.py -k fill

pytest's closing line stays the last one; the rest is said above it (pytest_total.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def workers(given: list[str]) -> list[str]:
    """Two pytest workers where there are two cores, unless the user says how many or wants the debugger."""
    mine = any(arg.startswith(("-n", "--numprocesses", "--pdb", "--trace", "-pno:xdist", "-s")) for arg in given)
    picked = any(not arg.startswith("-") for arg in given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [] if mine or picked or cores < 2 else ["-n", str(min(cores, 8))]


def main(args: list[str]) -> int:
    began = time.time()
    if args[:1] and args[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    everything = "--all" in args
    given = [arg for arg in args if arg != "--all"]
    env = {**os.environ, "LF_TEST_BEGAN": str(began)}
    bad = []
    if not given:
        for name, command in {"ruff": ["ruff", "check", "."], "mypy": ["mypy"]}.items():
            start = time.time()
            code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, check=False).returncode
            print(f"{name}: {'ok' if code == 0 else 'FAILED'}, {time.time() - start:.1f} s", flush=True)
            bad += [name] if code else []
    env["LF_TEST_FAILED"] = " ".join(bad)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(ROOT / "scripts/lib")]))
    tier = [] if everything else ["-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-p", "pytest_total", *tier, *workers(given), *given]
    try:
        code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    except KeyboardInterrupt:
        return 130
    return code or (1 if bad else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
