"""Which Python runs lf, and is everything in it? LF_PYTHON; else an environment that already has torch; else .venv of this checkout.

An environment that we did not make is checked and used as it is: nothing is ever installed or changed there. Standard library only, and
quick: this runs at every start.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import requirements

ROOT = Path(__file__).resolve().parents[2]
STAMP = "lf-setup.json"  # in .venv: {"state": "started" | "done", "wanted": what it was made from}


def wanted(root: Path) -> list[str]:
    """What .venv is made from; when it changes, .venv is brought up to date."""
    pyproject = (root / "pyproject.toml").read_text()
    fixed = pyproject.partition("[tool.")[0]  # settings of tools do not change what is installed
    return [str(root), fixed, (root / "constraints.txt").read_text()]


def state(venv: Path, want: list[str]) -> str:
    """'done', 'stale' (made from something else), 'started' (interrupted), 'none', or 'foreign' (not made by us)."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return "foreign" if venv.is_dir() and any(venv.iterdir()) and not (venv / STAMP).exists() else "none"
    if not (venv / "bin/python").exists():  # its Python was removed, or the checkout came from another machine
        return "started"
    if stamp["state"] != "done" or stamp["wanted"][0] != want[0]:
        return "started"
    return "done" if stamp["wanted"] == want else "stale"


def has_torch(python: str) -> bool:
    """Does this Python have torch? Found, not imported: that would take seconds."""
    if os.path.samefile(os.path.dirname(python), os.path.dirname(sys.executable)):
        return requirements.torch_version() is not None
    code = "import importlib.util as u, sys; s = u.find_spec('torch'); sys.exit(s is None or s.origin is None)"
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0


def choose(root: Path) -> str | None:
    """The Python of an environment to use as it is, or None: .venv of the checkout."""
    if os.environ.get("LF_PYTHON"):
        return sys.executable
    own = os.path.realpath(root / ".venv")
    for prefix in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), sys.prefix):
        if not prefix or os.path.realpath(prefix) == own:
            continue
        python = sys.executable if os.path.realpath(prefix) == os.path.realpath(sys.prefix) else os.path.join(prefix, "bin/python")
        if os.path.exists(python) and has_torch(python):
            return python
    return None


def check(python: str, want: list[str]) -> str:
    """'' when this Python (the running one) has all of it, else what to say. torch is named in the pip line as it is, so pip keeps it."""
    torch = requirements.torch_version()
    if torch is None:
        return (
            f"{python} has no torch, and lf installs none outside its own .venv. Install there the torch made for this machine's "
            f"accelerator, or unset LF_PYTHON: then a .venv is made in the checkout"
        )
    lack = requirements.lacking(want, lambda name: torch if name == "torch" else requirements.installed(name))
    for requirement, have in lack:
        if requirements.split(requirement)[0] == "torch":
            return f"{python} has torch {have}; lf needs {requirement} and never changes torch. Name another environment in LF_PYTHON"
    if not lack:
        return ""
    keep = [f"torch=={torch}"] if requirements.installed("torch") else []
    line = shlex.join([python, "-m", "pip", "install", *keep, *(requirement for requirement, _ in lack)])
    words = ", ".join(requirement + (f" (there is {have})" if have else "") for requirement, have in lack)
    return (
        f"{python} has torch {torch} and is used as it is. It lacks {words}. This adds what is missing and leaves torch alone:\n\n"
        f"    {line}\n"
    )


def start(what: str, args: list[str]) -> int:
    """Makes sure of the environment and becomes the launcher or the tests in it. Returns only when something is missing."""
    want = requirements.declared((ROOT / "pyproject.toml").read_text())
    if what == "test":
        want += requirements.declared((ROOT / "pyproject.toml").read_text(), "dev")
    python = choose(ROOT)
    if python is None:
        venv = ROOT / ".venv"
        if state(venv, wanted(ROOT)) != "done":
            import install  # only now: it is large, and nearly every start does without

            code = install.run(ROOT, dry=what == "launch" and "--dry-run" in takewhile(lambda arg: arg.startswith("-"), args))
            if code is not None:
                return code
        python = str(venv / "bin/python")
    elif python != sys.executable:  # the active environment is not that of the Python on PATH: check it from inside
        os.environ["LF_PYTHON"] = python
        os.execv(python, [python, *sys.argv])
    else:
        problem = check(python, want)
        if problem:
            print(f"lf: {problem}", file=sys.stderr)
            return 1
    # lf may not be installed in an environment that is not ours; the checkout is put first in any case.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    target = ["-m", "lf.launch"] if what == "launch" else [str(ROOT / "scripts/lib/suite.py")]
    sys.stdout.flush()
    os.execv(python, [python, *target, *args])
    return 0
