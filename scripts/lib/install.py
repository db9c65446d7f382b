"""Makes .venv: looks before it leaps (accelerator, disk, registry), installs the pinned versions with pip, says what it is doing and cost.

Interrupted, it starts over (pip keeps what it downloaded); two at once take turns; changed pins are installed on top.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import environment
from pip_progress import Progress, diagnose

GB = 1e9
NEED_CPU, NEED_CUDA, NEED_UPDATE = 2.5, 12.0, 1.0  # GB of disk, downloads on their way included
TORCH_CPU = "https://download.pytorch.org/whl/cpu"  # PyPI's torch for Linux is the CUDA build, with gigabytes of libraries


def say(text: str) -> None:
    print(f"lf: {text}", file=sys.stderr, flush=True)


def accelerator() -> str | None:
    """What shows that this machine has an accelerator, or None."""
    for pattern in ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/xpu[0-9]*", "/dev/xpuctrl", "/dev/kfd"):
        if found := sorted(glob.glob(pattern)):
            return found[0]
    return shutil.which("nvidia-smi")


def no_torch_for(found: str, python: str) -> str:
    """An accelerator and no torch: which build fits it is not ours to guess."""
    vendor = "NVIDIA: pip install torch" if "nvidia" in found else "its vendor's image or wheel"
    return (
        f"this machine has an accelerator ({found}) but {python} has no torch for it. Two ways out:\n"
        f"    install torch in the environment that you use ({vendor}), then run the same again: that environment is used\n"
        f"    LF_CPU=1 makes a .venv with the CPU build of torch and leaves the accelerator alone"
    )


def too_little_disk(free: float, need: float, where: str) -> str:
    """What to say when `need` GB are more than are free, else ''."""
    if free >= need:
        return ""
    return (
        f"the disk of {where} has {free:.1f} GB free; setting up needs {need:.1f} GB. Free some, move the checkout to a larger disk, "
        f"or name an environment that has torch: LF_PYTHON=/path/to/python"
    )


def answers(url: str, seconds: float = 3) -> bool:
    """Is there anything at this address? A refusal is an answer."""
    try:
        with urllib.request.urlopen(re.sub("//[^/@]*@", "//", url), timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def torch_source(python: str, pin: str) -> tuple[list[str], bool]:
    """(pip arguments, does a CPU build come): pip's own configuration when it knows one, else PyTorch's index when it answers."""
    if sys.platform != "linux":
        return [], True
    if "LF_TORCH_INDEX" in os.environ:
        url = os.environ["LF_TORCH_INDEX"]
        return (["--extra-index-url", url] if url else []), bool(url)
    versions = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "0", "index", "versions", "torch"]
    try:
        known = subprocess.run(versions, capture_output=True, text=True, timeout=30, check=False).stdout
    except subprocess.TimeoutExpired:
        known = ""
    if re.search(rf"\b{re.escape(pin)}\+cpu\b", known):
        return [], True
    if answers(f"{TORCH_CPU}/torch/"):
        return ["--extra-index-url", TORCH_CPU], True
    return [], False


def make_venv(venv: Path, log: Path, lock: int) -> str:
    """An empty environment with pip in it; '' or what went wrong. Debian ships Python without ensurepip: then pip copies itself in."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    if venv.exists():
        shutil.rmtree(venv)
    venv.mkdir()
    (venv / environment.STAMP).write_text(json.dumps({"state": "started"}))  # first, so that what an interruption leaves is known as ours

    def call(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(args, env={**os.environ, **env}, capture_output=True, text=True, check=False, pass_fds=(lock,))

    made = call(base, "-m", "venv", str(venv))
    if made.returncode == 0:
        return ""
    bare = call(base, "-m", "venv", "--without-pip", str(venv))
    where = call(base, "-c", "import os, pip; print(os.path.dirname(os.path.dirname(pip.__file__)))")
    if bare.returncode or where.returncode:
        why = (made.stderr or made.stdout).strip()[-400:]
        return f"{base} can make no environment with pip ({why}). On Debian: apt install python3-venv"
    pip = [str(venv / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--ignore-installed", "pip"]
    copied = call(*pip, PYTHONPATH=where.stdout.strip())
    log.write_text(copied.stdout + copied.stderr)
    return why_failed(log, base) if copied.returncode else ""


def index(python: str) -> str:
    """The package index that pip would ask, for messages: without a password."""
    shown = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    urls = dict(re.findall(r"^(\S*)index-url=['\"]?([^'\"\n]+)", shown, re.M))
    url = os.environ.get("PIP_INDEX_URL") or next((u for k, u in urls.items() if not k.endswith("extra-")), "https://pypi.org/simple")
    return re.sub("//[^/@]*@", "//", url)


def why_failed(log: Path, python: str) -> str:
    where = index(python)
    return diagnose(log.read_text(), where, lambda: answers(where, 10))


def pip_command(venv: Path, root: Path, source: list[str]) -> list[str]:
    # --no-compile: most of what comes is never imported; what is, Python compiles on first use.
    options = ["--no-compile", "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "-c", str(root / "constraints.txt")]
    return [str(venv / "bin/python"), "-m", "pip", "install", *options, *source, "-e", f"{root}[dev]"]


def run_pip(command: list[str], log: Path, pins: int, lock: int) -> tuple[int, Progress]:
    """Runs pip with its output in `log`, and tells how far it is. The lock is pip's too: it holds when we are killed."""
    scratch = log.with_name("tmp")  # /tmp may be small, or in memory; it is .venv's disk that was looked at
    scratch.mkdir(exist_ok=True)
    progress = Progress(pins)
    with open(log, "w") as sink, open(log) as source:
        env = {**os.environ, "TMPDIR": str(scratch)}
        pip = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=env, pass_fds=(lock,))
        try:
            while True:
                code = pip.poll()
                progress.read(source.read())
                progress.show(installed=len(glob.glob(str(log.with_name("lib") / "python3*/site-packages/*.dist-info"))))
                if code is not None:
                    break
                time.sleep(0.2)
        except BaseException:
            pip.kill()
            pip.wait()
            raise
        finally:
            progress.close()
            shutil.rmtree(scratch, ignore_errors=True)
    return code, progress


def size(folder: Path) -> float:
    """GB on disk."""
    total = 0
    for top, _, names in os.walk(folder):
        total += sum(os.lstat(os.path.join(top, name)).st_blocks * 512 for name in names)
    return total / GB


def run(root: Path, dry: bool = False) -> int | None:
    """Brings .venv up to date; None when it is, else an exit code after saying why not."""
    venv, want = root / ".venv", environment.wanted(root)
    there = environment.state(venv, want)
    if there == "foreign":
        say(f"{venv} was not made by lf. Move it away, or use it as it is: LF_PYTHON={venv}/bin/python")
        return 1
    if there != "stale" and not os.environ.get("LF_CPU") and (found := accelerator()):
        say(no_torch_for(found, sys.executable))
        return 1
    if dry:
        say(f"nothing is set up yet; a real run would make {venv} first (with {sys.executable}), by\n    "
            + shlex.join(pip_command(venv, root, [])) + "\nand only then is the command line of the ranks known")
        return 0
    with open(root / "constraints.txt") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up of {venv} is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a network disk without locks
            say(f"cannot lock {lock.name} ({error}); do not start two set-ups at once")
        try:
            return build(root, venv, want, environment.state(venv, want), lock.fileno())
        except KeyboardInterrupt:
            say("interrupted; the next start sets up again, without downloading twice what pip has kept")
            return 130


def build(root: Path, venv: Path, want: list[str], there: str, lock: int) -> int | None:
    """The set-up itself, under the lock."""
    if there == "done":  # the one that we waited for did it
        return None
    began, log = time.monotonic(), venv / "lf-setup.log"
    other = ">=" if sys.version_info < (3, 11) else "<"  # pins marked so are for the other Pythons
    pins = [line for line in want[2].splitlines() if "==" in line and f'python_version {other} "3.11"' not in line]
    torch = next(pin.partition("==")[2] for pin in pins if pin.startswith("torch=="))
    free = shutil.disk_usage(root).free / GB
    if problem := too_little_disk(free, NEED_UPDATE if there == "stale" else NEED_CPU, str(root)):
        say(problem)
        return 1
    if there != "stale":
        say(f"setting up {venv} with Python {sys.version.split()[0]}, once")
        if problem := make_venv(venv, log, lock):
            say(problem)
            return 1
    else:
        say(f"the pinned versions changed; bringing {venv} up to date")
    python = str(venv / "bin/python")
    (venv / environment.STAMP).write_text(json.dumps({"state": "started", "wanted": want}))
    source, cpu = torch_source(python, torch)
    if there != "stale":
        if not cpu and (problem := too_little_disk(free, NEED_CUDA, str(root))):
            say(f"only PyPI's torch can be reached, which is the CUDA build. {problem}")
            return 1
        say(f"torch {torch}, the CPU build: about 0.4 GB to download, 1.6 GB on disk" if cpu else
            f"torch {torch} from PyPI, the CUDA build ({TORCH_CPU} cannot be reached): about 3 GB to download, 8 GB on disk")
    code, progress = run_pip(pip_command(venv, root, source), log, len(pins), lock)
    if code:
        say(why_failed(log, python))
        say(f"pip's whole output: {log}")
        return 1
    say("checking that torch can be loaded")
    loaded = subprocess.run([python, "-c", "import torch, torch.distributed.run"], capture_output=True, text=True, check=False)
    if loaded.returncode:
        say(f"torch was installed but cannot be loaded: {loaded.stderr.strip()[-600:]}")
        return 1
    stamp = venv / (environment.STAMP + ".new")
    stamp.write_text(json.dumps({"state": "done", "wanted": want}))
    stamp.replace(venv / environment.STAMP)
    say(f"ready: {progress.summary()}, {size(venv):.1f} GB on disk, {time.monotonic() - began:.0f} s")
    return None
