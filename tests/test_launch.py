"""The launcher: what it would run, where ranks come from, and what happens when one of them fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lf
from lf import launch, position, supervise
from lf.cluster import Cluster, ClusterError, count_devices, find, first_host
from lf.mesh import MeshError

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "NNODES", "PET_NNODES", "MASTER_ADDR",
           "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH", "LF_RANK_LOGS", "LF_LAUNCHER", "LF_TIMEOUT")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Makes a script in an empty folder, which is where we stand; nothing in the environment speaks of a cluster."""
    monkeypatch.chdir(tmp_path)
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)

    def make(text: str = "", name: str = "job.py") -> Path:
        Path(name).write_text(text)
        return Path(name)

    return make


def start(*args: str, **env: str) -> subprocess.Popen[str]:
    add = {"PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        [sys.executable, "-m", "lf.launch", *args], env={**os.environ, **add}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


# what would run


def test_dry_run_prints_a_command_that_a_shell_takes_and_starts_nothing(script, capsys):
    script('OUT = "here"\nMESH = "dp=2,tp=2"')
    assert launch.main(["--dry-run", "job.py", "--name", "two words"]) == 0
    out = capsys.readouterr().out
    assert "--standalone" in out
    assert "--nproc-per-node 4" in out
    assert "-m -- lf.worker job.py --name 'two words'" in out
    assert "OMP_NUM_THREADS=" in out
    assert "LF_RANK_LOGS=" + str(Path("here/logs").absolute()) in out
    assert not Path("here").exists()


def test_dry_run_may_come_last_unless_it_is_the_scripts_own(script, capsys):
    script("print(1)")
    assert launch.main(["job.py", "--name", "x", "--dry-run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("-m -- lf.worker job.py --name x")
    script("dry_run = False")
    assert launch.main(["--dry-run", "job.py", "--dry-run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("-m -- lf.worker job.py --dry-run")


def test_the_printed_command_runs_by_hand(script, capsys):
    script('import os, sys; print("rank", os.environ["RANK"], os.environ["OMP_NUM_THREADS"], sys.argv)')
    assert launch.main(["--dry-run", "job.py", "a b"]) == 0
    # torchrun costs seconds; its place is taken by a rank of its own
    command = capsys.readouterr().out.replace("-m torch.distributed.run", "-m lf.worker job.py x #")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.startswith("rank 0 ")


@pytest.mark.parametrize(
    ("text", "args", "ranks"),
    [
        ("", [], 1),
        ('MESH = "tp=2,dp=3"', [], 6),
        ('MESH = "tp=2,dp=3"', ["--mesh", "pp=2"], 2),
        ('MESH = "tp=2,dp=3"', ["--mesh=cp=4"], 4),
        ('MESH: str = "tp=2"', ["--device", "cpu"], 2),
        ("", ["--config", "string.json"], 2),
        ("", ["--config", "table.json"], 6),
        ("RANKS = 1", ["--mesh", "tp=8"], 1),
        ("", ["--mesh", "dp=2,ep=2"], 2),
    ],
)
def test_the_mesh_says_how_many_ranks(script, text, args, ranks):
    script(text)
    Path("string.json").write_text('{"mesh": "tp=2"}')
    Path("table.json").write_text(json.dumps({"mesh": {"pp": 3, "dp": None, "tp": 2}}))
    made = launch.plan(Path("job.py"), args, env={})
    assert len(made.ranks) == ranks
    assert made.command[made.command.index("--nproc-per-node") + 1] == str(ranks)


def test_a_scripts_options_are_its_own(script):
    from torch.distributed.run import parse_args

    script()
    args = ["--run", "x", "--role", "y", "--", "--no", "-m"]  # of torchrun there are --run-path, --role, --no-python, -m
    found = parse_args(list(launch.plan(Path("job.py"), args, env={}).command[3:]))
    assert (found.module, found.training_script, found.training_script_args) == (True, "lf.worker", ["job.py", *args])


def test_how_long_a_collective_may_wait(script, monkeypatch):
    script()
    assert launch.plan(Path("job.py"), [], env={}, timeout=2.5).env["LF_TIMEOUT"] == "2.5"
    assert "LF_TIMEOUT" not in launch.plan(Path("job.py"), [], env={}).env
    monkeypatch.setenv("LF_TIMEOUT", "2.5")
    assert lf.connect(lf.Mesh(), lf.devices.get("cpu")).timeout.total_seconds() == 2.5
    assert lf.connect(lf.Mesh(), lf.devices.get("cpu"), timeout_s=7).timeout.total_seconds() == 7
    for wrong in ("0", "soon", "inf"):
        monkeypatch.setenv("LF_TIMEOUT", wrong)
        with pytest.raises(lf.config.ConfigError, match=f"LF_TIMEOUT={wrong}: give seconds"):
            lf.connect(lf.Mesh(), lf.devices.get("cpu"))


def test_the_run_folder(script):
    script('OUT = "runs/mine"')
    assert launch.plan(Path("job.py"), [], env={}).logs.parent == Path("runs/mine/logs")
    assert launch.plan(Path("job.py"), ["--out", "x"], env={}).logs.parent == Path("x/logs")
    script()
    assert launch.plan(Path("job.py"), [], env={}).logs.parent == Path("runs/job/logs")
    script('LOGS = "runs/export"')
    assert launch.plan(Path("job.py"), ["--out", "x"], env={}).logs.parent == Path("runs/export/logs")


def test_threads_are_shared_out_unless_set(script):
    script('MESH = "dp=2"')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert launch.plan(Path("job.py"), [], env={}).env["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert "OMP_NUM_THREADS" not in launch.plan(Path("job.py"), [], env={"OMP_NUM_THREADS": "7"}).env


def test_dp_fills_the_devices_that_are_visible(script):
    script()
    env = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert len(launch.plan(Path("job.py"), ["--device", "cuda", "--mesh", "tp=2"], env=env).ranks) == 4
    assert len(launch.plan(Path("job.py"), ["--device", "cuda"], env=env).ranks) == 4
    assert len(launch.plan(Path("job.py"), ["--device", "cuda", "--mesh", "dp=1"], env=env).ranks) == 1
    with pytest.raises(MeshError, match=r"= 8 ranks; this machine shows 4 cuda devices"):
        launch.plan(Path("job.py"), ["--device", "cuda", "--mesh", "tp=2,dp=4"], env=env)
    with pytest.raises(MeshError, match=r"= 8 ranks; the world has 4"):
        launch.plan(Path("job.py"), ["--device", "cuda", "--mesh", "tp=8"], env=env)
    assert count_devices("cuda", {"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert count_devices("cuda", {"CUDA_VISIBLE_DEVICES": "3,-1,2"}) == 1


# mistakes


def test_a_mesh_that_does_not_match_the_world_shows_both_products(script, capsys):
    script('MESH = "dp=2,tp=2"')
    assert launch.main(["--nproc", "8", "job.py"]) == 2
    said = capsys.readouterr().err
    assert "pp*dp*cp*tp = 1*2*1*2 = 4 ranks; the world has 8" in said
    assert "Traceback" not in said
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nothing.py"], "no script nothing.py"),
        (["job.py", "--mesh", "xp=2"], "unknown axis 'xp'"),
        (["--nproc", "two", "job.py"], "--nproc two"),
        (["--timeout", "0", "job.py"], "--timeout 0: give seconds"),
        (["--timeout=soon", "job.py"], "--timeout soon: give seconds"),
        (["--frob", "job.py"], "--frob is no option"),
        (["job.py", "--config", "gone.json"], "gone.json"),
        (["broken.py"], "broken.py, line 2"),
    ],
)
def test_mistakes_are_one_clear_line(script, capsys, args, said):
    script()
    script("x = 1\ny = = 2\n", "broken.py")
    assert launch.main(args) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_an_unknown_name_suggests_the_near_one(monkeypatch, tmp_path, capsys):
    for name in ("pretrain", "parity"):
        (tmp_path / f"{name}.py").write_text(f'"""Does {name}."""')
    monkeypatch.setattr(launch, "SCRIPTS", tmp_path)
    assert launch.main(["pretrian"]) == 2
    assert "did you mean pretrain? There are: parity, pretrain" in capsys.readouterr().err
    assert launch.main(["--help"]) == 0
    assert "parity       Does parity." in capsys.readouterr().out


def test_one_process_scripts_refuse_a_larger_world(script):
    script("RANKS = 1")
    with pytest.raises(MeshError, match=r"runs in 1 process.*the world has 8"):
        launch.plan(Path("job.py"), [], nproc=8, env={})


def test_the_launcher_loads_no_torch():
    code = "import sys, lf.launch, lf.supervise, lf.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# clusters


def test_a_rank_of_somebody_elses_launcher_runs_as_that_rank(script):
    script('MESH = "tp=2"')
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    made = launch.plan(Path("job.py"), [], env=env)
    assert made.ranks == range(3, 4)
    assert "torch.distributed.run" not in made.command
    with pytest.raises(MeshError, match="the world has 3"):
        launch.plan(Path("job.py"), [], env={**env, "WORLD_SIZE": "3"})


def test_srun():
    env = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_ID": "1234",
           "SLURM_STEP_NODELIST": "gpu[07-08]"}
    found = find(env)
    assert (found.world, found.rank, found.env["LOCAL_RANK"], found.env["LOCAL_WORLD_SIZE"]) == (8, 5, "1", "4")
    assert found.env["MASTER_ADDR"] == "gpu07"
    assert found.env["MASTER_PORT"] == find({**env, "SLURM_PROCID": "0"}).env["MASTER_PORT"]
    with pytest.raises(ClusterError, match="srun"):
        find({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    assert find({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == Cluster()
    assert first_host("a[1,3]-ib,b") == "a1-ib"
    assert first_host("host") == "host"


def test_one_process_per_machine(script):
    script('MESH = "tp=4"')
    env = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "m0", "RANK": "1", "WORLD_SIZE": "2"}
    made = launch.plan(Path("job.py"), [], env=env)
    assert made.ranks == range(8, 16)
    assert " ".join(("--nnodes 2 --node-rank 1 --master-addr m0", "--master-port 29500 --nproc-per-node 8")) in " ".join(made.command)
    with pytest.raises(MeshError, match="the world has 16"):
        launch.plan(Path("job.py"), ["--mesh", "tp=3"], env=env)
    with pytest.raises(ClusterError, match="NPROC_PER_NODE"):
        find({"NNODES": "2"})
    with pytest.raises(ClusterError, match="MASTER_ADDR"):
        find({"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "0"})
    with pytest.raises(ClusterError, match="1:4"):
        find({"NNODES": "1:4", "NPROC_PER_NODE": "8"})


# failures


def test_the_rank_that_failed_first_is_not_one_that_lost_its_peer():
    peer = {"rank": 0, "time": 1.0, "code": 1, "text": "RuntimeError: gloo/transport/tcp/pair.cc Connection closed by peer"}
    real = {"rank": 2, "time": 2.0, "code": 3, "text": "ValueError: boom"}
    late = {"rank": 1, "time": 3.0, "code": 1, "text": "KeyError: 1"}
    assert supervise.root_cause([peer, late, real], "", range(4)) == real
    killed = "E failed (exitcode: -9) local_rank: 3 (pid: 12) of binary: python"
    assert supervise.root_cause([peer], killed, range(4, 8)) == {"rank": 7, "code": -9, "text": ""}
    ended = "E failed (exitcode: -15) local_rank: 3 (pid: 12) of binary: python"
    assert supervise.root_cause([peer], ended, range(4)) == peer
    stood = "W Unable to shutdown process 12 via 15, forcefully exiting via 9\n" + killed  # a rank that hangs, and torchrun's own way out
    assert supervise.root_cause([peer], stood, range(4)) == peer
    assert supervise.root_cause([], "", range(4)) is None
    same = [{**real, "rank": 3, "time": 0.0}, real]
    assert supervise.root_cause(same, "", range(4)) == real  # all say the same: the lowest rank


def test_the_log_of_a_terminal_has_the_last_state_of_a_progress_bar():
    lines, rest = supervise.plain(b"one\r\n\x1b[31mtwo\x1b[0m\n 10%\r\x1b[2K 2", b"")
    assert lines == b"one\ntwo\n"
    lines, rest = supervise.plain(b"0%\r\x1b[2K 100%\nend", rest)
    assert lines == b" 100%\n"
    assert rest == b"end"


def test_a_rank_by_itself_reports_and_exits_with_its_code(script):
    script("import sys\nprint('working')\nsys.exit(7)")
    job = start("job.py", RANK="1", WORLD_SIZE="2", MASTER_PORT="1", TORCHELASTIC_RUN_ID="j1")
    out, err = job.communicate(timeout=60)
    assert job.returncode == 7
    assert out == ""
    assert "rank 1 failed (exit code 7)" in err
    assert Path("runs/job/logs/j1/rank1.log").read_text() == "working\n"


def test_a_word_to_the_user_comes_without_a_traceback(script):
    script("raise SystemExit('add --device cpu')")
    job = start("job.py", RANK="0", WORLD_SIZE="1", TORCHELASTIC_RUN_ID="j1")
    assert job.communicate(timeout=60)[1].startswith("add --device cpu\n")
    assert job.returncode == 1
    assert "add --device cpu" in Path("runs/job/logs/j1/rank0.log").read_text()


def test_ctrl_c_ends_quietly(script):
    script("import time\nprint('up', flush=True)\ntime.sleep(60)")
    job = start("job.py", RANK="0", WORLD_SIZE="1")
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGINT)
    assert "Traceback" not in job.communicate(timeout=30)[1]
    assert job.returncode == 130


SAVES = """
import os, signal, sys, time
from lf import signals
signals.SAME = 0.0
with signals.asked() as asked:
    print("up", flush=True)
    while not asked():
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR2, 0)])
def test_a_rank_that_is_asked_to_end_may_save_first(script, number, code):
    script(SAVES)
    job = start("job.py", "0.1", RANK="0", WORLD_SIZE="1")
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    job.send_signal(number)
    out, err = job.communicate(timeout=30)
    assert out == "saving\nsaved\n"
    assert ("ended by SIGTERM" in err) == (code == 143)
    assert "Traceback" not in err
    assert job.returncode == code


def test_a_second_signal_ends_a_rank_that_saves(script):
    script(SAVES)
    job = start("job.py", "60", RANK="0", WORLD_SIZE="1")
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGUSR2)
    assert job.stdout.readline() == "saving\n"
    job.send_signal(signal.SIGTERM)
    assert "saved" not in job.communicate(timeout=30)[0]
    assert job.returncode == 128 + signal.SIGUSR2


def test_a_script_that_does_not_listen_is_ended(script):
    script("import time\nprint('up', flush=True)\ntime.sleep(60)")
    job = start("job.py", RANK="0", WORLD_SIZE="1")
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGUSR2)
    assert "ended by SIGUSR2" in job.communicate(timeout=30)[1]
    assert job.returncode == 128 + signal.SIGUSR2


WAIT = """
import os, sys, time
MESH = "dp=3"
rank, out = os.environ["RANK"], sys.argv[1]
print("hello from", rank, flush=True)
open(f"{out}/{rank}.pid", "w").write(str(os.getpid()))
while len([f for f in os.listdir(out) if f.endswith(".pid")]) < 3:
    time.sleep(0.02)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def pids(folder: Path, seconds: float = 60) -> list[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [path.read_text() for path in folder.glob("*.pid")]
        if len(found) == 3 and all(found):
            return [int(text) for text in found]
        time.sleep(0.05)
    raise AssertionError("three ranks did not start")


def test_under_torchrun_the_failing_rank_speaks_first_and_the_others_end(script, tmp_path):
    script(WAIT + "if rank == '1':\n    raise ValueError('boom')\ntime.sleep(120)")
    job = start("job.py", str(tmp_path))
    out, err = job.communicate(timeout=100)
    assert job.returncode == 1
    assert out == "hello from 0\n"
    assert err.startswith("rank 1 failed (exit code 1):\nTraceback (most recent call last):\n")
    assert "ValueError: boom" in err
    assert "lf/worker.py" not in err
    assert gone(pids(tmp_path))
    logs = next(Path("runs/job/logs").iterdir())
    assert [(logs / f"rank{rank}.log").read_text().splitlines()[0] for rank in range(3)] == [f"hello from {rank}" for rank in range(3)]
    assert "ValueError: boom" in (logs / "rank1.log").read_text()


def test_under_torchrun_every_rank_hears_a_signal(script, tmp_path):
    listens = "from lf import signals\nwith signals.asked() as asked:\n"
    script(WAIT + listens + "    print('up', flush=True)\n    while not asked():\n        time.sleep(0.02)\n    print('heard', asked(), flush=True)")
    job = start("job.py", str(tmp_path))
    assert job.stdout is not None
    assert [job.stdout.readline() for _ in range(2)] == ["hello from 0\n", "up\n"]
    logs = next(Path("runs/job/logs").iterdir())
    end = time.monotonic() + 20
    while not all((logs / f"rank{r}.log").read_text().endswith("up\n") for r in range(3)) and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR2)
    job.communicate(timeout=60)
    assert job.returncode == 0
    assert [(logs / f"rank{r}.log").read_text().splitlines()[-1] for r in range(3)] == [f"heard {int(signal.SIGUSR2)}"] * 3


# where the ranks are

STANDS = """
import os, sys, time
from lf.position import Position
MESH = "pp=2"
rank = int(os.environ["RANK"])
position = Position(rank, f"pp={rank}", os.environ["LF_RANK_LOGS"])
number = position.program([f"{rank}{action}" for action in ("F0", "F1", "SEND_F0", "SEND_F1", "RECV_B0", "B0", "RECV_B1", "B1", "REDUCE[head]")])
for _ in range(2 - rank):
    position.start(number)
position.at(4)
def stands():
    open(f"{sys.argv[1]}/{rank}.up", "w").close()
    while not os.path.exists(f"{sys.argv[1]}/fail"):
        time.sleep(0.02)
    if rank == 1:
        position.at(7)
        raise ValueError("boom")
    os.read(os.pipe()[0], 1)
stands()
"""


def wait_for(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not come"
        time.sleep(0.02)


def test_under_torchrun_every_rank_says_where_it_is_when_asked_and_when_one_fails(script, tmp_path):
    script(STANDS)
    job = start("job.py", str(tmp_path))
    wait_for(lambda: all((tmp_path / f"{rank}.up").exists() for rank in (0, 1)))
    logs = next(Path("runs/job/logs").iterdir())
    stacks = [lambda rank=rank: (logs / f"rank{rank}.log").read_text().count("in stands") for rank in (0, 1)]
    job.send_signal(signal.SIGUSR1)
    assert job.stderr is not None
    said = [job.stderr.readline() for _ in range(5)]
    assert said[:2] == ["\n", "lf: where the ranks are:\n"]
    assert re.fullmatch(r"  rank 0  pp=0  step 2             .+ s +5 of 9: … 0F1 0SEND_F0 0SEND_F1 >>0RECV_B0<< 0B0 0RECV_B1 0B1 …\n", said[2])
    assert re.fullmatch(r"  rank 1  pp=1  step 1 \(1 behind\)  .+ s +5 of 9: … 1F1 1SEND_F0 1SEND_F1 >>1RECV_B0<< .*\n", said[3])
    assert said[4] == f"  Python stacks: {logs}/rank0.log … rank1.log\n"
    wait_for(lambda: [count() for count in stacks] == [1, 1])
    assert job.poll() is None  # the run goes on
    (tmp_path / "fail").touch()
    out, err = job.communicate(timeout=100)
    assert (job.returncode, out) == (1, "")  # nor is rank 0's screen written to
    cause, drawn = err.split("lf: where the ranks were:\n")
    assert "ValueError: boom" in cause
    assert "0SEND_F1 >>0RECV_B0<< 0B0" in drawn.splitlines()[0]
    assert "8 of 9: … 1RECV_B0 1B0 1RECV_B1 >>1B1<< 1REDUCE[head]" in drawn.splitlines()[1]
    assert "lf: rank 1 stopped first (exit code 1)" in drawn.splitlines()[3]
    assert stacks[0]() == 2  # rank 1's failure has asked it
    assert "in stands" in (logs / "rank1.log").read_text().split("Traceback")[1]


def test_a_rank_that_was_killed_is_drawn_too(script):
    script(STANDS.replace("stands()\n", "os.kill(os.getpid(), 9)\n"))
    job = start("job.py", ".", RANK="1", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="j1")
    err = job.communicate(timeout=60)[1]
    assert job.returncode == 137
    assert "rank 1 was ended by SIGKILL" in err
    assert "1SEND_F1 >>1RECV_B0<< 1B0" in err
    assert "Python stacks: runs/job/logs/j1/rank1.log\n" in err


def test_a_run_that_fails_before_its_work_draws_nothing(script):
    script("raise ValueError('boom')")
    job = start("job.py", RANK="1", WORLD_SIZE="2")
    assert "where the ranks" not in job.communicate(timeout=60)[1]


def test_what_is_left_of_an_older_run_is_not_drawn(script):
    logs = Path("runs/job/logs/j1")
    logs.mkdir(parents=True)
    old = position.Position(1, "", logs)
    old.start(old.program(["0F0"]))
    script("raise ValueError('boom')")
    job = start("job.py", RANK="1", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="j1")
    assert "where the ranks" not in job.communicate(timeout=60)[1]


def test_a_report_says_what_it_cannot_read(tmp_path, capsys):
    good = position.Position(0, "pp=0", tmp_path)
    good.start(good.program(["0F0", "0B0"]))
    (tmp_path / "rank1.at").write_bytes(b"damaged")
    assert supervise.report(3, tmp_path, range(4)) == 3
    said = capsys.readouterr().err
    assert "1 of 2: >>0F0<< 0B0" in said
    assert "rank 1        rank1.at is no position: 7 bytes" in said
    assert said.count("has not said where it is") == 2


def test_a_report_says_which_rank_did_not_end(tmp_path, capsys):
    """Rank 0 has waited in vain for rank 1, which neither went on nor ended; torchrun killed it."""
    lost = {"rank": 0, "time": 1.0, "code": 1, "text": "RuntimeError: gloo/transport Timed out waiting 10000ms\n"}
    (tmp_path / "rank0.error").write_text(json.dumps(lost))
    for rank in (0, 1):
        (tmp_path / f"rank{rank}.pid").write_text(f"7{rank}")
    (tmp_path / "torchrun0.log").write_text(
        "W Sending process 71 closing signal SIGTERM\nW Unable to shutdown process 71 via 15, forcefully exiting via 9\n"
        "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 71)\n"
    )
    assert supervise.report(1, tmp_path, range(2)) == 1
    said = capsys.readouterr().err
    assert "Timed out waiting 10000ms" in said
    assert "\n  rank 1 did not end when it was told to, and was killed\nlf: rank 0 stopped first" in said
    assert "SIGKILL" not in said


def test_a_signal_before_a_rank_listens_ends_nothing(script):
    script("import time\nprint('up', flush=True)\ntime.sleep(60)")
    job = start("job.py", RANK="0", WORLD_SIZE="1", TORCHELASTIC_RUN_ID="j1")
    assert job.stdout is not None
    wait_for(Path("runs/job/logs/j1/rank0.log").exists)  # the launcher listens
    for _ in range(20):
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGINT)
    assert "has not said where it is" in job.communicate(timeout=30)[1]
    assert job.returncode == 130


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_no_rank_outlives_a_killed_launcher(script, tmp_path):
    script(WAIT + "time.sleep(120)")
    job = start("job.py", str(tmp_path))
    ranks = pids(tmp_path)
    job.kill()
    job.communicate()
    assert gone(ranks)
