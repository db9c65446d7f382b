"""The set-up behind scripts/launch and scripts/test: which Python, what is missing, and how a set-up that cannot work says so."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts/lib"))

import environment  # noqa: E402
import install  # noqa: E402
import pip_progress  # noqa: E402
import requirements  # noqa: E402
import start  # noqa: E402

BASE = requirements.declared((ROOT / "pyproject.toml").read_text())
DEV = requirements.declared((ROOT / "pyproject.toml").read_text(), "dev")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what the set-up reads, with no environment chosen."""
    for name in ("LF_PYTHON", "LF_CPU", "LF_TORCH_INDEX", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("pyproject.toml", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "README.md").write_text("lf\n")
    monkeypatch.setattr(install, "accelerator", lambda: None)
    return root


# Python


def test_an_old_python_is_told_what_is_needed():
    assert start.too_old((3, 9, 18))
    assert start.too_old((2, 7))
    assert not start.too_old((3, 10, 0))
    assert start.complaint((2, 7), "/usr/bin/python", False).startswith("lf: /usr/bin/python is Python 2.7; lf needs 3.10 or newer. Install")
    assert "LF_PYTHON" in start.complaint((3, 8), "python", True)


def test_old_pythons_can_read_the_first_file():
    source = (ROOT / "scripts/lib/start.py").read_text()
    tree = ast.parse(source)
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Starred)) and node.lineno < 15]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    tested = 0
    for name in ("python2.7", "python3.6", "python3.8", "python3.9"):
        if not shutil.which(name) or subprocess.run([name, "-c", ""], capture_output=True, check=False).returncode:
            continue
        said = subprocess.run(["sh", str(ROOT / "scripts/test")], env={**os.environ, "LF_PYTHON": name}, capture_output=True, text=True, check=False)
        assert said.returncode == 1
        assert "lf needs 3.10 or newer" in said.stderr
        tested += 1
    print(f"{tested} old Pythons on PATH")


def test_a_newer_python_on_path_is_found_and_a_dead_shim_is_not(tmp_path, monkeypatch):
    for name, line in {"python3.11": "exit 127", "python3.12": "echo /opt/python 3 12", "python3.13": "echo /opt/other 3 13"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start.newer_on_path() == "/opt/python"
    assert start.newer_on_path(("python3.99",)) is None


def test_no_such_lf_python():
    env = {**os.environ, "LF_PYTHON": "/no/python"}
    said = subprocess.run(["sh", str(ROOT / "scripts/launch")], env=env, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert said.stderr.startswith("lf: LF_PYTHON=/no/python is no program")


# requirements


def test_requirements_are_read_as_toml_reads_them():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == BASE
    assert project["optional-dependencies"]["dev"] == DEV


def test_versions():
    assert requirements.split("a-b[x,y]>=1.2,<3 ; python_version < '4'") == ("a-b", [(">=", "1.2"), ("<", "3")])
    assert requirements.satisfies("2.5.1+xpu", [(">=", "2.5")])
    assert requirements.satisfies("2.5.0a0+nv24", [(">=", "2.5")])
    assert not requirements.satisfies("2.4.9", [(">=", "2.5")])
    assert requirements.satisfies("10.0", [(">=", "9.1"), ("!=", "10.1")])
    assert requirements.satisfies("1.0", [("==", "1.0.0")])
    with pytest.raises(ValueError, match="only"):
        requirements.split("a~=1")


@pytest.mark.parametrize("old", [True, False])
def test_every_requirement_has_a_pin_that_meets_it_on_every_python(old):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if found := re.fullmatch(r'([\w.-]+)==([\w.]+)(?:; python_version (<|>=) "3.11")?', line):
            if found.group(3) != (">=" if old else "<"):
                assert found.group(1) not in pins
                pins[found.group(1)] = found.group(2)
        else:
            assert line.startswith("#")
    assert pins["torch"] == "2.13.0"
    assert requirements.lacking(BASE + DEV, lambda name: pins.get(name.lower().replace("_", "-"))) == []


def test_one_pip_line_for_what_is_missing_and_torch_stays(monkeypatch):
    there = {"torch": "2.6.0+vendor", "rich": "1.0", **{requirements.split(r)[0]: "99" for r in BASE if not r.startswith(("torch", "rich", "tyro"))}}
    monkeypatch.setattr(requirements, "torch_version", lambda: there.get("torch"))
    monkeypatch.setattr(requirements, "installed", there.get)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("nothing may be run"))
    said = environment.check("/env/bin/python", BASE)
    assert [line.strip() for line in said.splitlines() if "pip install" in line] == [
        "/env/bin/python -m pip install torch==2.6.0+vendor 'tyro>=0.9' 'rich>=13.7'"
    ]
    assert "(there is 1.0)" in said
    there["torch"] = "2.1.0"
    assert "never changes torch" in environment.check("/env/bin/python", BASE)
    assert "pip install" not in environment.check("/env/bin/python", BASE)
    there.pop("torch")
    assert "has no torch" in environment.check("/env/bin/python", BASE)
    there.update(torch="2.6.0", rich="14", tyro="1")
    assert environment.check("/env/bin/python", BASE) == ""


@pytest.mark.parametrize("how", ["LF_PYTHON", "VIRTUAL_ENV", "PATH"])
def test_an_environment_with_torch_is_used_and_left_alone(checkout, tmp_path, monkeypatch, how):
    env = tmp_path / "image"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    packages = next((env / "lib").glob("python3*/site-packages"))
    (packages / "torch").mkdir()
    (packages / "torch/__init__.py").write_text("raise RuntimeError('torch must not be imported')")
    (packages / "torch/version.py").write_text("__version__ = '2.6.0+vendor'\n")
    (packages / "torch-2.6.0+vendor.dist-info").mkdir()
    (packages / "torch-2.6.0+vendor.dist-info/METADATA").write_text("Name: torch\nVersion: 2.6.0+vendor\n")
    before = sorted(packages.rglob("*"))
    add = {
        "LF_PYTHON": {"LF_PYTHON": str(env / "bin/python")},
        "VIRTUAL_ENV": {"VIRTUAL_ENV": str(env)},
        "PATH": {"PATH": f"{env / 'bin'}:{os.environ['PATH']}"},
    }[how]
    said = subprocess.run([str(checkout / "scripts/launch"), "demo"], env={**os.environ, **add}, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    lines = [line.strip() for line in said.stderr.splitlines() if "pip install" in line]
    assert len(lines) == 1
    assert re.match(rf"{re.escape(str(env))}/bin/python3? -m pip install torch==2.6.0\+vendor 'numpy>=", lines[0])
    assert sorted(packages.rglob("*")) == before
    assert not (checkout / ".venv").exists()


# .venv


def test_states_of_the_environment(checkout):
    venv, want = checkout / ".venv", environment.wanted(checkout)
    assert environment.state(venv, want) == "none"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").touch()
    assert environment.state(venv, want) == "foreign"
    assert install.run(checkout) == 1  # somebody's own: neither used nor cleared
    stamp = venv / environment.STAMP
    stamp.write_text(json.dumps({"state": "started"}))
    assert environment.state(venv, want) == "started"
    stamp.write_text(json.dumps({"state": "done", "wanted": want}))
    assert environment.state(venv, want) == "done"
    assert environment.state(venv, [*want[:2], "torch==9\n"]) == "stale"
    assert environment.state(venv, ["/moved", *want[1:]]) == "started"
    (venv / "bin/python").unlink()
    assert environment.state(venv, want) == "started"


def test_settings_of_tools_do_not_call_for_a_new_set_up(checkout):
    before = environment.wanted(checkout)
    (checkout / "pyproject.toml").write_text((checkout / "pyproject.toml").read_text() + "\n[tool.other]\nx = 1\n")
    assert environment.wanted(checkout) == before


def test_a_full_disk_is_seen_before_anything_is_made(checkout, monkeypatch, capsys):
    assert install.too_little_disk(30, 2.5, "/x") == ""
    assert "/x has 1.2 GB free; setting up needs 2.5 GB" in install.too_little_disk(1.2, 2.5, "/x")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10, 10**8))  # type: ignore[attr-defined]
    assert install.run(checkout) == 1
    assert "0.1 GB free" in capsys.readouterr().err
    assert not (checkout / ".venv").exists()


def test_an_accelerator_without_torch_is_refused_with_two_ways_out(checkout, monkeypatch, capsys):
    monkeypatch.setattr(install, "accelerator", lambda: "/dev/nvidia0")
    assert install.run(checkout) == 1
    said = capsys.readouterr().err
    assert "/dev/nvidia0" in said
    assert "pip install torch" in said
    assert "LF_CPU=1" in said
    assert not (checkout / ".venv").exists()


def test_a_registry_that_cannot_be_reached_is_named(checkout, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0", "TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("LF_TORCH_INDEX", "")
    monkeypatch.setattr(install, "NEED_CUDA", 0.0)
    assert install.run(checkout) == 1
    said = capsys.readouterr().err
    assert "the package registry http://127.0.0.1:9/simple cannot be reached" in said
    assert "HTTPS_PROXY" in said
    assert environment.state(checkout / ".venv", environment.wanted(checkout)) == "started"


def test_two_set_ups_at_once_take_turns_and_the_second_finds_it_done(checkout, monkeypatch):
    made = []

    def build(root, venv, want, there, lock):
        if there == "done":
            return
        made.append(there)
        time.sleep(0.3)
        (venv / "bin").mkdir(parents=True)
        (venv / "bin/python").touch()
        (venv / environment.STAMP).write_text(json.dumps({"state": "done", "wanted": want}))

    monkeypatch.setattr(install, "build", build)
    both = [threading.Thread(target=install.run, args=(checkout,)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert made == ["none"]


def test_a_dry_run_sets_nothing_up(checkout, capsys):
    assert install.run(checkout, dry=True) == 0
    assert "pip install" in capsys.readouterr().err
    assert not (checkout / ".venv").exists()


def test_progress_counts_what_pip_says():
    progress = pip_progress.Progress(9)
    progress.read("Collecting a\n  Downloading a-1.0-py3-none-any.whl (1.5 MB)\n  Downloading b-2.0-py3-no")
    progress.read("ne-any.whl.metadata (5.0 kB)\n  Using cached c-3-py3-none-any.whl (2.0 MB)\n")
    progress.read("  Downloading https://x/whl/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (190.1 MB)\n")
    assert "3 of about 9 packages; 192 MB downloaded" in progress.text()
    assert "torch-2.13.0+cpu downloading (190.1 MB)" in progress.text()
    progress.read("Installing collected packages: a, c, torch\n")
    assert "installing 2 of 3 packages" in progress.text(installed=2)
    assert progress.summary() == "3 packages, 192 MB downloaded (and 2 MB from pip's cache or local files)"


def test_what_a_failed_pip_means():
    assert "disk became full" in pip_progress.diagnose("OSError: [Errno 28] No space left on device", "u")
    assert "u cannot be reached" in pip_progress.diagnose("NewConnectionError: Failed to establish a new connection", "u")
    assert "u has no torch==2.13.0 that fits Python" in pip_progress.diagnose("ERROR: No matching distribution found for torch==2.13.0", "u")
    nothing = "ERROR: No matching distribution found for setuptools>=77"
    assert "u cannot be reached" in pip_progress.diagnose(nothing, "u", lambda: False)
    assert "odd thing" in pip_progress.diagnose("odd thing", "u")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_checkout_sets_itself_up_once(checkout, monkeypatch):
    shutil.copytree(ROOT / "lf", checkout / "lf", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("LF_CPU", "1")
    base = getattr(sys, "_base_executable", sys.executable)
    monkeypatch.setenv("PATH", f"{os.path.dirname(base)}:{os.environ['PATH']}")
    first = subprocess.run([str(checkout / "scripts/launch"), "--help"], capture_output=True, text=True, check=False)
    if not (checkout / ".venv").exists():
        pytest.skip("the Python that made this environment has torch of its own")
    assert first.returncode == 0, first.stderr
    assert re.search(r"ready: \d+ packages, \d+ MB downloaded.* GB on disk, \d+ s", first.stderr)
    python = [str(checkout / ".venv/bin/python"), "-c", "import torch, lf; print(torch.__version__)"]
    version = subprocess.run(python, capture_output=True, text=True, check=True)
    assert version.stdout.startswith("2.13.0")
    began = time.monotonic()
    again = subprocess.run([str(checkout / "scripts/launch"), "--help"], capture_output=True, text=True, check=True)
    assert again.stderr == ""
    print(f"again: {time.monotonic() - began:.2f} s")
