"""Run folders: one command at a time, equal settings, metrics that go on where the checkpoint was."""

import errno
import fcntl
import json
import os
from threading import Event

import attrs
import pytest
from helpers import context, processes

import lf
from lf.axes_sim import SimAxes
from lf.config import ConfigError
from lf.runs import RunError, cut_metrics, on_every_rank, on_first_rank, once_per_node, open_run, read_metrics, same_data


@attrs.frozen
class Config:
    lr: float = 0.1
    data: tuple[str, ...] = ("a", "b")


def trained(folder):
    """A run that has made one step."""
    open_run(folder, Config(), lf.solo()).lock.close()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


def test_the_same_settings_go_on_and_others_are_named(tmp_path):
    trained(tmp_path)
    open_run(tmp_path, Config(), lf.solo()).lock.close()
    with pytest.raises(ConfigError, match=r"lr: the run has 0.1, this command 0.2") as caught:
        open_run(tmp_path, Config(lr=0.2), lf.solo())
    assert "data" not in str(caught.value)
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1, "data": ["a", "b"]}


def test_settings_with_which_nothing_was_trained_bind_nobody(tmp_path):
    open_run(tmp_path, Config(data=("typo",)), lf.solo()).lock.close()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000001.partial").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    open_run(tmp_path, Config(), lf.solo()).lock.close()
    assert json.loads((tmp_path / "config.json").read_text())["data"] == ["a", "b"]
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    with pytest.raises(ConfigError, match="lr: the run has"):
        open_run(tmp_path, Config(lr=0.2), lf.solo())


@pytest.mark.parametrize(("text", "error"), [("{", "not JSON"), ("[]", "no config of a run"), ('{"model_type": "x"}', "other settings")])
def test_a_config_that_is_no_run_of_this_script_is_refused_and_kept(tmp_path, text, error):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=error):
        open_run(tmp_path, Config(), lf.solo())
    assert (tmp_path / "config.json").read_text() == text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write into .*file .*; give another --out"):
        open_run(tmp_path / "file", Config(), lf.solo())


def test_two_commands_never_share_a_folder(tmp_path):
    run = open_run(tmp_path, Config(), lf.solo())
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        open_run(tmp_path, Config(), lf.solo())
    run.lock.close()
    open_run(tmp_path, Config(), lf.solo()).lock.close()


def test_a_file_system_without_locks_is_said_and_no_other_command_blamed(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    open_run(tmp_path, Config(), lf.solo()).lock.close()
    assert "cannot be locked (No locks available): take care that no other command writes there" in capsys.readouterr().out


def _refused_everywhere(axes, folder):
    try:
        open_run(folder, Config(lr=0.3), axes)
    except ConfigError as error:
        return str(error)
    return ""


def test_every_rank_hears_why(tmp_path):
    trained(tmp_path)
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


def test_work_once_per_node_reaches_all(monkeypatch):
    monkeypatch.setattr(SimAxes, "first_of_node", property(lambda axes: axes.rank in (0, 3)))

    def body(axes):
        good = once_per_node(lambda: {"by": axes.rank}, axes)
        everybody = on_every_rank(lambda: axes.rank, axes)
        stop = Event()
        with pytest.raises((RunError, ZeroDivisionError), match="zero") as caught:
            once_per_node(lambda: 1 // (3 - axes.rank) and stop.wait(), axes)  # rank 0 is never done: nobody waits for it
        stop.set()
        return good, everybody, str(caught.value)

    for rank, said in enumerate(lf.sim.spmd(lf.Mesh(dp=5), body)):
        by = "" if rank == 3 else "rank 3: "
        assert said == ([{"by": 0}, {"by": 3}], [0, 1, 2, 3, 4], f"{by}integer division or modulo by zero"), rank


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_work_that_ends_the_process_ends_all(end):
    def stop():
        raise end("enough")

    def body(axes):
        with pytest.raises(end if axes.rank == 0 else RunError, match="enough") as caught:
            on_first_rank(stop, axes)
        return str(caught.value)

    assert lf.sim.spmd(lf.Mesh(dp=3), body) == ["enough"] + [f"rank 0: {end.__name__} enough"] * 2


def test_a_line_says_what_a_step_is():
    model = lf.hf.model("qwen3-demo")
    ctx = context(lf.solo(), "bf16")
    line = lf.runs.summary("small", lf.layout(model, lf.Mesh(tp=2, dp=2)), ctx, 64, 2, 3, "1f1b, 1 stage")
    size = sum(p.numel() for p in lf.tree.leaves(lf.init(lf.layout(model, lf.Mesh(dp=1)), ctx, 0)))
    step = "a step is 12 rows of 64 = 2 × 3 microbatches × dp=2; 1f1b, 1 stage"
    assert line == f"small: {size:,} parameters in bfloat16 on {lf.Mesh(tp=2, dp=2)} (cpu); {step}"


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

