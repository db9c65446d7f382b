"""scripts/parity as a user runs it: exit codes 0, 1, 2, the table, the JSON."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import attrs
import pytest
from helpers import ROOT

import lf


def run(monkeypatch, *args: str, device: tuple[str, ...] = ("--device", "cpu")) -> int:
    """Its exit code, run in this process: what a user types after `scripts/launch parity`."""
    monkeypatch.setattr(sys, "argv", ["parity", *device, *args])
    try:
        runpy.run_path(str(ROOT / "scripts/parity.py"), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def test_it_is_one_process_for_the_launcher() -> None:
    assert "\nRANKS = 1" in (ROOT / "scripts/parity.py").read_text()
    assert "\nRANKS = 1" in (ROOT / "scripts/mutate.py").read_text()


def test_by_itself(tmp_path) -> None:
    command = [sys.executable, "scripts/parity.py", "--device", "cpu", "--mesh", "tp=2", "--mesh", "dp=2", "--json", "-", "--tied", "False"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    told = json.loads(out.stdout)
    assert told["ok"] is True
    assert [r["mesh"] for r in told["reports"]] == ["tp=2", "dp=2"]
    assert all(row["ok"] for r in told["reports"] for row in r["rows"])
    assert any(row["name"] == "gradient head/weight" for row in told["reports"][0]["rows"])
    assert "ok: mesh tp=2" in out.stderr


def test_a_preset_is_shrunk_and_says_so(monkeypatch, capsys, tmp_path) -> None:
    file = tmp_path / "report.json"
    assert run(monkeypatch, "--model", "qwen3-0.6b", "--mesh", "tp=3", "--json", str(file)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "qwen3-0.6b is shrunk: 28 layers, width 1024, 16 heads (8 kv), 151936 words → 2 layers" in out
    config = json.loads(file.read_text())["config"]
    assert (config["vocab"], len(config["layers"]), config["layers"][0]["mixer"]["heads"]) == (199, 2, 8)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--mesh", "tq=2"), "unknown axis 'tq'"),
        (("--mesh", "cp=2"), "context parallelism (cp=2) is not built yet"),
        (("--mesh", "pp=2", "--schedule", "1f2b"), "unknown schedule '1f2b'; did you mean '1f1b'"),
        (("--mesh", "pp=2", "--chunks", "2"), "one_f_one_b has one stage on each rank"),
        (("--mesh", "pp=2", "--recompute", "fll"), "unknown part of --recompute 'fll'; did you mean 'full'"),
        (("--mesh", "pp=2", "--schedule", "zb-v", "--split", "e,2,h"), "--split e,2,h is of 3 stages; --schedule zb-v on pp=2 has 4"),
        (("--mesh", "tp=2", "--compile"), "compiled layers: mesh tp=2 has tp=2"),
        (("--mesh", "tp=0"), "mesh axis tp=0 must be at least 1"),
        (("--model", "nonsense"), "nonsense"),
        (("--tokens", "3"), "--tokens 3: at least 4"),
        (("--precision", "fp31"), "unknown precision 'fp31'; did you mean 'fp32'"),
        (("--microbatches", "0"), "--microbatches 0: at least 1"),
        (("--json", "/no/such/folder/x.json"), "--json /no/such/folder/x.json: No such file or directory; name a file"),
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_what_cannot_run_ends_with_2_and_one_line(monkeypatch, capsys, args: tuple[str, ...], words: str) -> None:
    assert run(monkeypatch, *args) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    if "nonsense" not in args[0] and "--chunks" not in args:
        assert len(err.strip().splitlines()) == 1


def test_schedules_stand_side_by_side(monkeypatch, capsys, tmp_path) -> None:
    file = tmp_path / "report.json"
    monkeypatch.setenv("COLUMNS", "200")
    flags = ("--mesh", "pp=2", "--schedule", "gpipe", "--schedule", "zb-h1", "--microbatches", "3", "--split", "e+1,1+h", "--recompute", "full:1")
    assert run(monkeypatch, *flags, "--offload", "full", "--freeze", "layers.0.attn/norm", "--json", str(file)) == 0
    rest = "split e+1,1+h recompute full:1 offload full freeze layers.0.attn/norm"
    out = capsys.readouterr().out
    assert all(f"ok: mesh pp=2 {name} {rest}, 3 microbatches a rank" in out for name in ("gpipe", "zb-h1"))
    reports = json.loads(file.read_text())["reports"]
    assert [r["about"] for r in reports] == [f"gpipe {rest}", f"zb-h1 {rest}"]
    rows = {row["name"] for row in reports[0]["rows"]}
    assert {"gradient layers.0.attn/qkv", "parameter layers.0.attn/norm"} < rows
    assert "gradient layers.0.attn/norm" not in rows


def test_in_less_than_float64_it_says_what_it_compares(monkeypatch, capsys, tmp_path) -> None:
    file = tmp_path / "report.json"
    assert run(monkeypatch, "--model", "tiny-moe", "--mesh", "tp=2,ep=2", "--precision", "bf16", "--json", str(file)) == 0
    assert "quantities agree with one rank, within bf16" in " ".join(capsys.readouterr().out.split())
    (report,) = json.loads(file.read_text())["reports"]
    assert report["precision"] == "bf16"
    rows = {row["name"]: row for row in report["rows"]}
    assert 1e-3 < rows["gradient layers.1.experts/down"]["tolerance"] / rows["gradient layers.1.experts/down"]["size"] <= 0.5
    assert rows["layers.1.route/load"]["error"] == 0


def test_a_device_without_float64_compares_less(monkeypatch) -> None:
    monkeypatch.setattr(lf.devices.get("cpu"), "FLOAT64", False)
    with pytest.raises(lf.config.ConfigError, match="no float64, which parity is measured in; use --device cpu, or --precision fp32"):
        lf.parity.compare(lf.models.small.tiny(), lf.Mesh(tp=2, dp=1), steps=1)
    assert lf.parity.compare(lf.models.small.tiny(), lf.Mesh(tp=2, dp=1), steps=1, precision="fp32").ok


def test_without_a_device_it_says_what_is_here(monkeypatch, capsys) -> None:
    assert run(monkeypatch, device=()) == 2
    assert "no device named; found here: cpu (" in (err := capsys.readouterr().err)
    assert "Add --device cpu" in err


def test_where_the_report_cannot_go_nothing_is_measured(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(lf.parity, "compare", lambda *a, **k: pytest.fail("measured"))
    for place, words in ((tmp_path, "Is a directory"), (tmp_path / "no/r.json", "No such file or directory"), ("", "No such file or directory")):
        assert run(monkeypatch, "--json", str(place)) == 2
        err = capsys.readouterr().err
        assert f"--json {place}: {words}; name a file" in err
        assert len(err.strip().splitlines()) == 1


def test_a_crash_is_no_verdict(monkeypatch, capsys) -> None:
    def crash(*a, **k):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(lf.parity, "compare", crash)
    assert run(monkeypatch, "--mesh", "tp=2") == 2
    assert "RuntimeError: out of paper" in capsys.readouterr().err


def test_a_disagreement_ends_with_1(monkeypatch, capsys) -> None:
    from lf.parallel.redistribute import EDGES

    edge = EDGES["P→S"]
    monkeypatch.setitem(EDGES, "P→S", attrs.evolve(edge, backward=lambda *a, **k: edge.backward(*a, **k) / 2))
    assert run(monkeypatch, "--mesh", "tp=2") == 1
    out = capsys.readouterr().out
    assert "DISAGREES: mesh tp=2" in out
    assert "gradient embed/weight: error" in out


def test_ranks_that_do_not_fit_together_end_with_1(monkeypatch, capsys, tmp_path) -> None:
    from lf.axes_sim import SimAxis

    scatter = SimAxis.reduce_scatter
    monkeypatch.setattr(
        SimAxis, "reduce_scatter", lambda self, x, *a, **k: self.all_reduce(x) if self.index else scatter(self, x, *a, **k)
    )
    assert run(monkeypatch, "--mesh", "tp=2", "--json", str(tmp_path / "r.json")) == 1
    assert "DISAGREES: mesh tp=2: CollectiveMismatch: ranks 0 and 1 differ" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["ok"] is False
