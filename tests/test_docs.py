"""The pages in docs/ are true: their commands run, one after another as they stand there, and the flags and names that they mention exist.

What only costs time is made small before a command runs: models, rows, steps (`small`). Files that a page names are made by `here`; a name on the
hub is a folder here; every device is the CPU; a mesh is as many processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import operator
import re
import shlex
import shutil
import sys
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import attrs
import pytest
import tyro
from helpers import QWEN3, ROOT, processes
from matplotlib.image import imread

import lf
from lf import launch
from lf.checkpoint import hub
from lf.models import presets
from lf.models.small import shrunk

PAGES = sorted((ROOT / "docs").glob("*.md"))
TASKS = ("pretrain", "continue", "evaluate", "export", "pipeline", "chains", "moe", "optim", "sharding", "plan")
SAID = "to be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows of outrageous fortune"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


@lru_cache
def script(name: str) -> Any:
    """A script as a module; not by its name: `tokenize` is Python's."""
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(f"script_{name}", launch.scripts()[name])
    assert spec is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@lru_cache
def flags(name: str) -> frozenset[str]:
    """Those that a script's parser says that it has."""
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        tyro.cli(script(name).Config, args=["--help"])
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", said.getvalue())) - {"--help", "--no-joined", "--no-compile", "--no-full", "--no-fp8"}


# commands


def text(n: int) -> str:
    words = SAID.split()
    return " ".join(words[i * i % len(words)] for i in range(n, n + 40))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the pages name, in which we stand."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my/texts", "my/code"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(4):
            (tmp_path / folder / f"{i}.txt").write_text(text(i))
    for name in ("corpus", "held"):
        records = ({"text": text(i), "content": text(i)} for i in range(24))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lf.data.train_bpe([text(0)] * 3, 270, tmp_path / "my/tokenizer")
    (defined,) = (source for source in blocks(ROOT / "docs/pipeline.md", "python") if "\ndef " in source)
    (tmp_path / "my/schedule.py").write_text(defined)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text(json.dumps(QWEN3))
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp32")
    layout = lf.layout(lf.hf.model(tmp_path / "config"), ctx.axes.mesh)
    lf.hf.save(tmp_path / "my/model", layout, lf.init(layout, ctx, seed=0), ctx, tmp_path / "my/tokenizer")

    for name, config in presets.PRESETS.items():
        monkeypatch.setitem(presets.PRESETS, name, attrs.evolve(shrunk(config), vocab=290))
    monkeypatch.setattr(hub, "fetch", lambda *_: tmp_path / "my/model")  # tests/checkpoint/test_checkpoint_hub.py has a hub
    monkeypatch.setattr(lf.pictures, "loss_curve", lambda *_: None)  # tests/test_demo.py looks at it
    monkeypatch.setitem(lf.log.SINKS, "wandb", lambda run, first: nullcontext(lambda record: None))  # tests/test_log.py has one that writes
    return tmp_path


def small(config: Any) -> Any:
    """The same request, on the CPU and in little time."""
    less: dict[str, Any] = {"device": "cpu", "seq_len": 32, "global_batch": 4, "save_every": 2, "workers": 1, "warmup": 1}
    asked = {f.name: getattr(config, f.name) for f in attrs.fields(type(config))}
    if asked.get("step"):
        less["step"] = 2
    less |= {"tokens": 3 * 4 * 32} if asked.get("tokens") else {"steps": 3}
    if asked.get("batch_ramp"):
        less["batch_ramp"] = "2:2:4"
    if asked.get("microbatches") and "mesh" in asked:
        less["global_batch"] = asked["microbatches"]
    less |= {name: 2 for name in ("eval_every", "drift_every") if asked.get(name)}
    if "products" in asked:  # a plan, of devices that are not here
        less = {"seq_len": 32, "ranks": 8, "global_batch": 32, "top": 1}
    return attrs.evolve(config, **{name: value for name, value in less.items() if name in asked})


def on_a_rank(axes: Any, name: str, config: Any) -> None:
    script(name).main(config)


def run(command: str) -> None:
    program, *args = shlex.split(command)
    assert program == "scripts/launch", command
    args = ["cpu" if word == "cuda" else word for word in args]
    assert launch.main(["--dry-run", *args]) == 0, command
    while args[0].startswith("--"):  # the launcher's own, each with its value
        del args[:2]
    name, *own = args
    config = small(tyro.cli(script(name).Config, args=own))
    mesh = lf.Mesh.parse("" if name in ("parity", "plan") else getattr(config, "mesh", "")).fill()  # these have their ranks on paper
    if mesh.size > 1:
        processes(mesh, on_a_rank, name, config)
    else:
        script(name).main(config)


def commands(page: str) -> list[str]:
    return [line for block in blocks(ROOT / "docs" / f"{page}.md", "sh") for line in block.splitlines()]


@pytest.mark.parametrize("page", TASKS)
def test_the_commands_of_a_page_run_one_after_another(page: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    if page in ("evaluate", "export"):
        run(commands("pretrain")[0])  # the run that they speak of
    told = commands(page)
    assert len(told) >= 2
    for command in told:
        out = re.search(r"--out (\S+)", command)
        if (done := lf.checkpoint.latest(here / out[1] / "checkpoints") if out else None) is not None:
            shutil.rmtree(done)  # it is there, so the page speaks of a run that goes on: from the checkpoint before
        run(command)
        if " pretrain " in command and out:
            records = lf.runs.read_metrics(here / out[1] / "metrics.jsonl")
            assert [r["step"] for r in records] == [*range(1, len(records) + 1)], command
            assert len(records) >= 3, command
            assert (here / out[1] / "hf/model.safetensors").exists(), command
    names: dict[str, Any] = {}  # shared from top to bottom
    for source in blocks(ROOT / "docs" / f"{page}.md", "python"):
        exec(compile(source, f"docs/{page}.md", "exec"), names)
    if page == "pretrain":
        last = lf.runs.read_metrics(here / "runs/evaluated/metrics.jsonl")[-1]
        assert {f"eval/{name}/{key}" for name in ("held", "code", "validation") for key in ("loss", "perplexity")} < last.keys()
        assert list((here / "runs/logged/tensorboard").iterdir())
        named = re.search(r"`(step tokens loss [\w ]+)`", (ROOT / "docs/pretrain.md").read_text(encoding="utf-8"))
        assert named
        assert set(named[1].split()) - last.keys() <= {"mfu"}  # no CPU's peak is known
    if page == "pipeline":
        assert (here / "runs/pipeline/step-00000003.svg").exists()
        said = capsys.readouterr().out
        rows = re.findall(r"^\| `([\w-]+)` \| (.*\d) \|$", (ROOT / "docs/pipeline.md").read_text(encoding="utf-8"), re.M)
        assert {name for name, _ in rows} == lf.schedule.named.SCHEDULES.keys()
        for name, numbers in rows:  # those that the first command has printed, but for the mean and the messages
            (line,) = (line for line in said.splitlines() if f" {name} " in line and "│" in line)
            told = [cell.strip() for cell in line.split("│")[2:]]
            assert numbers.split(" | ") == [told[i] for i in (0, 1, 2, 4)], name
    if page == "evaluate":
        report = json.loads((here / "first.json").read_text())
        assert report["eval/held/perplexity"] > 1
    if page == "moe":
        drawn, stored = (imread(file)[..., :3] for file in (here / "layout.png", ROOT / "docs/moe-layout.png"))
        assert drawn.shape == stored.shape
        assert (abs(drawn - stored).max(-1) > 0.1).mean() < 0.02, "docs/moe-layout.png is another layout; the page's code draws it"
        assert (here / "runs/moe/experts.png").exists()
    if page == "export":
        assert (here / "exports/older/tokenizer.json").exists()


# names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_mentions_exists(page: Path) -> None:
    prose = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    spoken = ("pretrain", "tokenize", "evaluate", "export", "schedule", "parity", "bench_chains", "bench_zero", "plan")
    ours = set().union(*(flags(name) for name in spoken)) | {"--config"}
    for words in re.findall(r"`([^`\n]+)`", prose):
        first = words.split()[0]
        if re.fullmatch(r"lf(\.\w+)+", first):
            operator.attrgetter(first.removeprefix("lf."))(lf)
        if re.match(r"(docs|scripts|tests|lf)/", first):
            assert (ROOT / first).exists(), words
        if page.stem in TASKS and first.startswith("--") and not first.startswith("--signal"):
            assert first in ours, words
    for link in re.findall(r"\]\((\S+?)\)", prose):
        assert "://" in link or (page.parent / link).exists(), link


def ours(page: str) -> dict[str, set[str]]:
    """{script: flags} of the first column of the tables: `--model` is of pretrain, `tokenize --out` of the script that is named."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").splitlines():
        for name, flag in re.findall(r"`(?:(\w+) )?(--[\w-]+)[^`]*`", line.split("|")[1] if line.startswith("|") else ""):
            found.setdefault(name or "pretrain", set()).add(flag)
    return found


def test_what_is_called_what_is_what_the_parsers_take() -> None:
    found = ours("coming-from")
    assert {"pretrain", "tokenize", "evaluate", "export"} == found.keys()
    for name, mentioned in found.items():
        assert not mentioned - flags(name) - {"--config"}, name
    assert not flags("pretrain") - found["pretrain"], "these should have a line, if only to say that nothing is called so elsewhere"
    assert {"--model", "--seq-len", "--weights-dtype"} <= flags("pretrain")
    assert not {"--tp", "--num-layers"} & flags("pretrain")


def test_the_tables_are_tables() -> None:
    for page in PAGES:
        width = 0
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            cells = line.count("|") if line.startswith("|") else 0
            assert not (width and cells) or cells == width, f"{page.name}, line {number}"
            width = cells


def test_the_readme_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES if f"docs/{page.name}" not in readme]
