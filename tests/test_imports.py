"""`import lf` is quick, and imports run downwards only.

The levels are those of the design, with what it leaves open put where the code needs it: `state` runs a forward, so it stands above `schedule`;
a checkpoint holds a state; the loop saves checkpoints and makes steps, so it stands above `checkpoint` and `train`. The launcher's modules
(cluster, position, dump, worker, supervise, launch) and the command line (cli, console, runs) need little of the rest and stand low.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

LEVELS = (
    ("position", "dump"),
    ("tree", "box", "mesh", "paper", "axis", "config", "batch", "console", "worker", "cluster", "signals"),
    ("sharding",),
    ("spec", "axes", "devices", "runs", "cli", "supervise"),
    ("rng", "axes_sim", "axes_meta", "axes_counted", "context", "segment", "launch", "log"),
    ("split", "ops", "chains"),
    ("layouts", "deal"),
    ("kernels", "parallel", "chain_layouts"),
    ("models", "bridge", "chain_context", "meter"),
    ("schedule", "optim", "data", "axes_metered"),
    ("state", "ramp", "record", "pipeline", "plan_layers", "plan_ops", "plan_time", "plan_state"),
    ("checkpoint", "evaluate", "drift", "memory", "chain_feed"),
    ("train", "sim", "pictures", "expert_picture", "agreement"),
    ("parity", "loop", "plan"),
    ("plan_search",),
    ("plan_show",),
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def imports(source: str) -> set[str]:
    """Modules of lf that a source imports, lazily or not, but for type checkers: 'lf.x.y' as 'x'."""
    found: set[str] = set()

    class Look(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(a.name.split(".")[1] if "." in a.name else "" for a in node.names if a.name.split(".")[0] == "lf")

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            first, *rest = (node.module or "").split(".")
            if first == "lf":
                found.update(rest[:1] or [a.name for a in node.names])

    Look().visit(ast.parse(source))
    return found


def home(path: Path) -> str:
    """'x' for lf/x.py and for everything in lf/x/."""
    return path.relative_to(ROOT / "lf").parts[0].removesuffix(".py")


def wrong(module: str, imported: set[str]) -> list[str]:
    return [name for name in sorted(imported - {module}) if name not in LEVEL or LEVEL[name] >= LEVEL[module]]


def test_imports_run_downwards_only() -> None:
    files = [f for f in sorted((ROOT / "lf").rglob("*.py")) if f != ROOT / "lf/__init__.py"]
    unknown = sorted({home(f) for f in files} - set(LEVEL))
    assert not unknown, f"give {unknown} a place in LEVELS"
    bad = {str(f.relative_to(ROOT)): found for f in files if (found := wrong(home(f), imports(f.read_text())))}
    assert not bad, f"these import from their own level or above: {bad}"


def test_the_check_sees_an_upward_import() -> None:
    lines = {"from lf.train import make": {"train"}, "import lf.train": {"train"}, "from lf import train": {"train"}, "import lf": {""}}
    for line, expected in lines.items():
        assert imports(f"def f():\n    {line}") == expected
        assert wrong("mesh", expected) == sorted(expected)
    assert imports("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lf.train import make") == set()
    assert wrong("train", {"mesh", "train"}) == []


def loaded_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(out.stdout.split())


def test_import_lf_loads_nothing_heavy() -> None:
    loaded = loaded_after("import lf; lf.Mesh(dp=2, tp=2).coords(3); lf.config; dir(lf)")
    assert "lf.mesh" in loaded
    assert not loaded & {"torch", "torch.distributed", "numpy", "transformers", "datasets", "matplotlib"}


def test_training_code_loads_no_library_of_others() -> None:
    loaded = loaded_after("import lf; lf.train, lf.parity, lf.data, lf.hf, lf.optim, lf.checkpoint, lf.show, lf.models")
    assert "lf.train" in loaded
    assert not loaded & {"transformers", "datasets", "tokenizers", "huggingface_hub", "matplotlib", "transformer_engine", "pandas"}


STEP = """
import sys, torch
already = "sympy" in sys.modules
import lf
from lf.models.small import tiny
layout, ctx = lf.layout(model := tiny(), lf.Mesh(dp=1)), lf.Context(lf.solo(), lf.devices.get("cpu"))
init, step = lf.train.make(layout, lf.optim.adamw(1e-3), lf.schedule.one_f_one_b(1, 1), ctx)
step(init(lf.init(layout, ctx, 0)), lf.parity.random_batches(model, 0, 0, 1, 7))
assert already or "sympy" not in sys.modules
"""


def test_a_step_loads_no_library_of_others() -> None:
    """torch itself loads sympy, 36 MiB, where its autograd.grad is given gradients."""
    assert not loaded_after(STEP) & {"torch._dynamo", "transformers", "matplotlib", "pandas"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    import lf

    with pytest.raises(AttributeError, match="module 'lf' has no attribute 'nonsense'"):
        _ = lf.nonsense
    assert "redistribute" in dir(lf)
