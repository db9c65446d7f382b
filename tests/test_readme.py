"""What README.md and docs/design.md say is so: their code runs, their commands parse, what they name exists, what is not there is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import operator
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro
from matplotlib.image import imread

import lf
from lf import launch
from lf.models.small import tiny, tiny_moe
from lf.parallel import redistribute as moves
from lf.schedule.compiled import refuse_compile

ROOT = Path(__file__).resolve().parents[1]
README, DESIGN = (ROOT / name for name in ("README.md", "docs/design.md"))
PAGES = pytest.mark.parametrize("page", [README, DESIGN], ids=lambda p: p.stem)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def table(page: Path, first: str) -> dict[str, list[str]]:
    """The rows of the table whose header begins with `first`: {first cell: the other cells}."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = rest
    return rows


# code


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script of the README in a folder of its own, which is where we stand."""
    (source,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "first.py"
    path.write_text(source, encoding="utf-8")
    return path


def steps(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+ +loss ([\d.]+)$", printed, re.M)]


def python(script: Path, *args: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args, str(script)], env=env, capture_output=True, text=True, check=True, timeout=100).stdout


def test_the_script_of_the_readme_learns_and_four_ranks_print_the_same(script: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    alone = steps(python(script))
    assert len(alone) == 10
    assert alone[-1] < alone[0] - 1

    names: dict[str, Any] = {"__file__": str(script)}
    monkeypatch.setattr(lf.cli, "run", lambda main: None)
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), names)
    axes_of: dict[int, Any] = {}
    monkeypatch.setattr(lf, "connect", lambda mesh, device: axes_of[threading.get_ident()])

    def rank(axes: Any) -> None:
        axes_of[threading.get_ident()] = axes
        names["main"]("tp=2,dp=2")

    lf.sim.spmd(lf.Mesh(tp=2, dp=2), rank)
    together = steps(capsys.readouterr().out)
    assert together == pytest.approx(alone, abs=2e-4)  # float32, printed with four places


@pytest.mark.slow
def test_the_script_of_the_readme_on_four_processes(script: Path):
    alone = steps(python(script))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LF_PYTHON": sys.executable}
    command = [str(ROOT / "scripts/launch"), script.name, "--mesh", "tp=2,dp=2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=200)
    assert steps(done.stdout) == pytest.approx(alone, abs=2e-4)


def test_the_snippets_of_the_design_run_one_after_another():
    names: dict[str, Any] = {}
    for source in blocks(DESIGN, "python"):
        exec(compile(source, "docs/design.md", "exec"), names)


def test_the_edge_table_of_the_design_is_the_one_that_runs():
    rows = table(DESIGN, "edge")
    said = {pair: tuple("_" + words.replace("-", "_").replace(" ", "_") for words in cells) for pair, cells in rows.items()}
    assert said == {pair: (edge.forward.__name__, edge.backward.__name__) for pair, edge in moves.EDGES.items()}


def test_the_picture_is_drawn_from_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    picture = importlib.import_module("picture")
    losses = picture.main(picture.Config(steps=8, out=str(tmp_path / "first.png")))
    for precision, tolerance in (("fp64", 1e-12), ("fp32", 1e-4)):
        one, many = (losses[which][precision] for which in ("one", "many"))
        assert many == pytest.approx(one, rel=tolerance)
        assert len(one) == 8
        assert one[-1] < one[0] - 0.1
    assert losses["one"]["fp64"] == pytest.approx(losses["one"]["fp32"], rel=1e-3)
    drawn, stored = (imread(folder / "first.png")[..., :3] for folder in (tmp_path, ROOT / "docs"))
    assert drawn.shape == stored.shape
    other = abs(drawn - stored).max(-1) > 0.05  # the curves are of fewer steps; the program, in the lower third, is the same
    assert other.mean() < 0.1
    assert other[2 * len(other) // 3 :].mean() < 0.02, "docs/first.png shows another program; python docs/picture.py draws it anew"
    assert (stored.min(-1) < 0.9).mean() > 0.1, "an empty picture"
    assert (ROOT / "docs/first.png").stat().st_size < 300_000


# commands


def commands() -> list[str]:
    lines = [line for block in blocks(README, "sh") + blocks(README, "bash") for line in block.splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_is_taken(command: str, script: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    program, *args = shlex.split(command)
    if program == "python":
        assert args == [script.name]  # run above
    elif program == "scripts/test":
        assert os.access(ROOT / program, os.X_OK)
        assert not args
    else:
        assert program == "scripts/launch"
        assert os.access(ROOT / program, os.X_OK)
        assert launch.main(["--dry-run", *args]) == 0, capsys.readouterr().err
        assert "lf.worker" in capsys.readouterr().out
        name, *own = args
        if name in launch.scripts():
            monkeypatch.syspath_prepend(ROOT / "scripts")
            spec = importlib.util.spec_from_file_location(f"script_{name}", launch.scripts()[name])  # `tokenize` by name is Python's
            assert spec is not None
            monkeypatch.setitem(sys.modules, spec.name, module := importlib.util.module_from_spec(spec))
            spec.loader.exec_module(module)  # type: ignore[union-attr]
            tyro.cli(module.Config, args=own)


# names


@PAGES
def test_what_a_page_names_exists(page: Path):
    text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for words in re.findall(r"`([^`\n]+)`", text) + [link for link in re.findall(r"\]\((\S+?)\)", text) if "://" not in link]:
        first, *rest = words.split()
        if re.fullmatch(r"lf(\.\w+)+", first):
            operator.attrgetter(first.removeprefix("lf."))(lf)
        elif first == "scripts/launch" and rest and not rest[0].endswith(".py"):
            launch.resolve(rest[0])
        elif (("/" in first and not first.startswith(".venv")) or re.search(r"\.(py|md|png|ipynb)$", first)) and first != "first.py":
            assert (ROOT / first).exists(), words


def test_each_law_has_a_test():
    laws = re.findall(r"^(\d+)\. \*\*", DESIGN.read_text(encoding="utf-8").split("## The laws")[1], re.M)
    rows = table(README, "law")
    assert [first.split(".")[0] for first in rows] == laws
    for law, (shown,) in rows.items():
        tests = re.findall(r"`(tests/\S+)`", shown)
        assert tests, law
        assert all((ROOT / test).exists() for test in tests), law  # that they pass is for the suite to say


def test_nothing_is_left_to_fill_in():
    for page in (README, DESIGN):
        text = page.read_text(encoding="utf-8")
        assert "MEASURE" not in text
        assert "TODO" not in text


def test_the_map_of_the_readme_names_what_is_there():
    (plan,) = (block for block in blocks(README, "") if "lf/mesh.py" in block)
    for line in plan.splitlines():
        for place in re.split(r"  +", line)[:-1]:
            assert (ROOT / place).exists() or (ROOT / "lf" / place).exists(), place


# what is not there yet


def model_of_type(kind: str) -> Callable[[Path], Any]:
    def refused(folder: Path) -> Any:
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 8}))
        return lf.hf.model(folder)

    return refused


def adapter(folder: Path) -> Any:
    (folder / "adapter_config.json").write_text("{}")
    return lf.hf.model(folder)


def on(**sizes: int) -> Callable[[Path], Any]:
    return lambda folder: lf.layout(tiny(), lf.Mesh(**{"dp": 2, **sizes}))


def compiled_mixture(folder: Path) -> Any:
    refuse_compile(lf.Mesh(dp=1), lf.devices.get("cpu"), segments=tiny_moe().segments)


def four_bits(folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}))
    return lf.hf.model(folder)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "context (`cp`)": (on(cp=2), r"cp=2\) is not built yet; use cp=1"),
    "sparse attention": (model_of_type("deepseek_v32"), "its sparse attention.*is not built yet"),
    "compiled mixtures": (compiled_mixture, "run a model with experts without compilation"),
    "weights in four bits": (four_bits, "quant_method='mxfp4'"),
    "other families": (model_of_type("gpt2"), "unknown model_type 'gpt2'"),
    "vision-language": (model_of_type("qwen3_vl"), "unknown model_type 'qwen3_vl'"),
    "diffusion": (model_of_type("flux"), "unknown model_type 'flux'"),
    "action": (model_of_type("pi0"), "unknown model_type 'pi0'"),
    "adapters": (adapter, "cannot read .*config.json"),
    "Kunlun": (lambda folder: lf.devices.get("kunlun"), "device 'kunlun' is not built yet"),
    "FP8": (lambda folder: lf.Context(lf.solo(), lf.devices.get("cpu"), "fp8"), "unknown precision 'fp8'"),
}
NO_FLAG = {"data sets from a hub", "chat templates", "checkpoints of others"}  # there is no way to ask for it
NOT_YET = [item for works, later in table(README, "part").values() for item in later.split(", ") if item]


@pytest.mark.parametrize("item", [item for item in NOT_YET if item not in NO_FLAG])
def test_what_the_readme_says_is_not_there_yet_is_refused(item: str, tmp_path: Path):
    ask, message = REFUSED[item]
    with pytest.raises(ValueError, match=message) as caught:
        ask(tmp_path)
    assert type(caught.value).__module__.startswith("lf.")  # a message made for the user


def test_the_table_of_what_works_is_complete():
    rows = table(README, "part")
    assert set(NOT_YET) == set(REFUSED) | NO_FLAG
    assert set(rows["precision"][0].split(", ")) == set(lf.context.PRECISIONS)
    assert set(rows["devices"][0].lower().split(", ")) == set(lf.devices.KNOWN)
