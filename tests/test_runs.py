"""Run folders: one command at a time, equal settings, metrics that go on where the checkpoint was."""

import json
import os

import attrs
import pytest
from helpers import processes

import lf
from lf.config import ConfigError
from lf.runs import RunError, cut_metrics, on_first_rank, open_run, read_metrics, same_data


@attrs.frozen
class Config:
    lr: float = 0.1
    data: tuple[str, ...] = ("a", "b")


def test_the_same_settings_go_on_and_others_are_named(tmp_path):
    open_run(tmp_path, Config(), lf.solo()).lock.close()
    open_run(tmp_path, Config(), lf.solo()).lock.close()
    with pytest.raises(ConfigError, match=r"lr: the run has 0.1, this command 0.2") as caught:
        open_run(tmp_path, Config(lr=0.2), lf.solo())
    assert "data" not in str(caught.value)
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1, "data": ["a", "b"]}


def test_a_broken_config_is_refused_and_kept(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="not JSON"):
        open_run(tmp_path, Config(), lf.solo())
    assert (tmp_path / "config.json").read_text() == "{"


def test_two_commands_never_share_a_folder(tmp_path):
    run = open_run(tmp_path, Config(), lf.solo())
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        open_run(tmp_path, Config(), lf.solo())
    run.lock.close()
    open_run(tmp_path, Config(), lf.solo()).lock.close()


def _refused_everywhere(axes, folder):
    try:
        open_run(folder, Config(lr=0.3), axes)
    except ConfigError as error:
        return str(error)
    return ""


def test_every_rank_hears_why(tmp_path):
    open_run(tmp_path, Config(), lf.solo()).lock.close()
    words = processes(2, _refused_everywhere, tmp_path)
    assert words[0] == words[1]
    assert "lr: the run has 0.1, this command 0.3" in words[0]


def test_work_on_the_first_rank_reaches_all():
    def body(axes):
        good = on_first_rank(lambda: {"by": axes.rank, "word": "größer"}, axes)
        try:
            on_first_rank(lambda: 1 // axes.rank, axes)
        except (RunError, ZeroDivisionError) as error:
            return good, str(error)

    for mesh in (lf.Mesh(dp=1), lf.Mesh(dp=3)):
        for good, bad in lf.sim.spmd(mesh, body):
            assert good == {"by": 0, "word": "größer"}
            assert "zero" in bad


def test_metrics_after_the_checkpoint_and_a_torn_line_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_metrics(path, 3) == []
    path.write_text("".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 6)) + '{"step": 6, "lo')
    assert [r["step"] for r in cut_metrics(path, 9)] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in cut_metrics(path, 3)] == [1, 2, 3]
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_other_data_is_refused():
    same_data({"seed": 0}, {"seed": 0})
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        same_data({"seed": 0}, {"seed": 1})

