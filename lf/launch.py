"""Starts a script under torchrun, on as many ranks as its mesh asks for. `scripts/launch` and the console command lf-train are this file.

A script says what the launcher must know with literals at module level, read without importing it, and with arguments that win over them:

    MESH = "tp=2,dp=2"      its mesh without --mesh; without either, one rank, or with --device cuda every device that is visible
    RANKS = 1               it simulates its ranks in one process, so --mesh does not set their number
    OUT = "runs/demo"       its run folder without --out; without either, runs/NAME
    LOGS = "runs/export"    where its logs go when --out is not the folder of a run

--mesh, --device and --out are also read from the JSON of --config FILE. Where a cluster fixes the number of ranks (lf/cluster.py), the mesh
must match it. Each rank runs in lf/worker.py; lf/supervise.py watches them. Nothing here imports torch: an answer comes at once.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from lf.cluster import Cluster, ClusterError, count_devices, find
from lf.mesh import Mesh, MeshError

HOME = Path(__file__).resolve().parents[1]
SCRIPTS = HOME / "scripts"
USAGE = """{command} [--dry-run] [--nproc N] [--timeout S] NAME|path.py [the script's own arguments]

  --dry-run    print the exact command line and what it adds to the environment; start nothing (may also come after NAME)
  --nproc N    N ranks, whatever the devices or the cluster say; the mesh must match
  --timeout S  a collective that some rank does not join ends the run after S seconds; without it 600
"""


class LaunchError(ValueError):
    """Something about the command line that the user can put right."""


@attrs.frozen
class Plan:
    """What will run."""

    command: tuple[str, ...]
    env: dict[str, str]  # what is added to the environment
    logs: Path
    ranks: range  # the global ranks of this machine
    torchrun: bool
    title: str


def scripts() -> dict[str, Path]:
    return {path.stem: path for path in sorted(SCRIPTS.glob("*.py"))}


def resolve(name: str) -> Path:
    """The script of this name or path. Raises LaunchError that lists what there is."""
    known = scripts()
    if name in known and not name.endswith(".py"):
        return known[name]
    if os.sep in name or name.endswith(".py"):
        if Path(name).is_file():
            return Path(name)
        raise LaunchError(f"there is no script {name} (looked from {Path.cwd()})")
    if not known:
        raise LaunchError(f"{name!r}: no scripts come with this installation; give the path of one, as {name}.py")
    near = difflib.get_close_matches(name, known, 1)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise LaunchError(f"there is no script {name!r}{guess or '.'} There are: {', '.join(known)}; or give the path of one")


def facts(script: Path) -> dict[str, object]:
    """The module-level literals MESH, RANKS, OUT and LOGS, and `doc`: the first line of the docstring."""
    try:
        tree = ast.parse(script.read_bytes(), str(script))
    except SyntaxError as error:
        raise LaunchError(f"{script}, line {error.lineno}: {error.msg}") from None
    out: dict[str, object] = {"doc": (ast.get_docstring(tree) or "").partition("\n")[0]}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id in ("MESH", "RANKS", "OUT", "LOGS"):
                    out[target.id] = node.value.value
    return out


def option(args: Sequence[str], name: str) -> str | None:
    """Value of --name among a script's arguments; the last one wins."""
    value = None
    for i, arg in enumerate(args):
        if arg == f"--{name}" and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(f"--{name}="):
            value = arg.partition("=")[2]
    return value


def settings(args: Sequence[str], known: Mapping[str, object]) -> dict[str, str | None]:
    """mesh, device and out: from the arguments, else from --config, else from the script."""
    file: dict = {}
    if path := option(args, "config"):
        try:
            file = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise LaunchError(f"--config {path}: {error}") from None
    mesh = file.get("mesh")
    if isinstance(mesh, dict):
        file["mesh"] = ",".join(f"{axis}={size}" for axis, size in mesh.items() if size is not None)
    return {
        key: option(args, key) or file.get(key) or (str(known[key.upper()]) if known.get(key.upper()) is not None else None)
        for key in ("mesh", "device", "out")
    }


def count(mesh: Mesh, device: str | None, ranks: int | None, nproc: int | None, cluster: Cluster, env: Mapping[str, str]) -> tuple[int, str]:
    """(ranks in all, how the mesh reads then). Raises MeshError showing both products when the mesh and the world differ."""
    world = nproc or cluster.world
    if ranks is not None:
        if world not in (None, ranks):
            raise MeshError(f"this script runs in {ranks} process (it simulates the ranks of its mesh); the world has {world}. Start it alone")
        return ranks, "simulated in one process"
    if world is None and device in ("cuda", "kunlun"):
        there = count_devices(device, env)
        if mesh.dp is None:
            world = there
        elif mesh.size > there:
            seen = f" (CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']})" if "CUDA_VISIBLE_DEVICES" in env else ""
            product = f"pp*dp*cp*tp = {mesh.pp}*{mesh.dp}*{mesh.cp}*{mesh.tp} = {mesh.size}"
            raise MeshError(f"mesh {mesh} has {product} ranks; this machine shows {there} {device} devices{seen}. Each rank needs its own")
    full = mesh.fill(world or 0)
    return full.size, f"mesh {full}"


def plan(script: Path, args: Sequence[str], nproc: int | None = None, env: Mapping[str, str] = os.environ, timeout: float | None = None) -> Plan:
    """What to run for a script with these arguments, here."""
    known = facts(script)
    want = settings(args, known)
    cluster = find(env)
    ranks = known.get("RANKS")
    size, title = count(
        Mesh.parse(want["mesh"] or ""), want["device"], ranks if isinstance(ranks, int) else None, nproc, cluster, env
    )
    here = range(cluster.first, cluster.first + (size if cluster.here is None else cluster.here))
    logs = Path(str(known.get("LOGS") or want["out"] or f"runs/{script.stem}")) / "logs" / (cluster.job or time.strftime("%Y%m%d-%H%M%S"))
    if cluster.job is None and cluster.rank is None:
        base, n = logs, 1
        while logs.exists():
            logs, n = base.with_name(f"{base.name}-{n + 1}"), n + 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = int(cluster.env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_WORLD_SIZE", len(here)))) if cluster.rank is not None else len(here)
    add = {"LF_RANK_LOGS": str(logs.absolute()), **{k: v for k, v in cluster.env.items() if env.get(k) != v}}
    if timeout is not None:
        add["LF_TIMEOUT"] = f"{timeout:g}"
    if "OMP_NUM_THREADS" not in env:
        add["OMP_NUM_THREADS"] = str(max(1, cores // beside))
    if (SCRIPTS / "launch").exists():  # a checkout need not be installed; scripts/launch may have put it there already, a shell has not
        paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(HOME))]
        add["PYTHONPATH"] = os.pathsep.join([str(HOME), *paths])
    run = ("lf.worker", str(script), *args)
    if cluster.rank is not None:
        return Plan((sys.executable, "-m", *run), add, logs, here, False, f"{title}: rank {cluster.rank} of {size}")
    torchrun = ("-m", "torch.distributed.run", *cluster.torchrun, "--nproc-per-node", str(len(here)))
    torchrun += ("--log-dir", str(logs / f"torchrun{here.start}"))
    # without -- torchrun takes a script's --run for the beginning of options of its own
    return Plan((sys.executable, *torchrun, "-m", "--", *run), add, logs, here, True, f"{title}: {size} rank{'s' * (size > 1)}")


def text(made: Plan) -> str:
    """The plan as a command that a shell takes."""
    words = [f"{name}={shlex.quote(value)}" for name, value in made.env.items()] + [shlex.join(made.command)]
    return f"# {made.title}; logs in {made.logs}\n" + " \\\n    ".join(words)


def usage(command: str) -> str:
    lines = [f"  {name:<12} {facts(path)['doc']}" for name, path in scripts().items()]
    return USAGE.format(command=command) + ("\nScripts (each has --help of its own):\n" + "\n".join(lines) + "\n" if lines else "")


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    command = "scripts/launch" if (SCRIPTS / "launch").exists() else "lf-train"
    dry, nproc, timeout = False, None, None
    try:
        while args and args[0].startswith("-"):
            flag, _, value = args.pop(0).partition("=")
            if flag in ("-h", "--help"):
                print(usage(command), end="")
                return 0
            if flag == "--dry-run":
                dry = True
            elif flag == "--nproc":
                value = value or (args.pop(0) if args else "")
                if not value.isdigit() or int(value) < 1:
                    raise LaunchError(f"--nproc {value}: give a number of ranks, 1 or more")
                nproc = int(value)
            elif flag == "--timeout":
                value = value or (args.pop(0) if args else "")
                if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) == 0:
                    raise LaunchError(f"--timeout {value}: give seconds, more than 0")
                timeout = float(value)
            else:
                raise LaunchError(f"{flag} is no option of {command}; a script's own options come after its name")
        if not args:
            print(usage(command), end="")
            return 0 if argv is None and len(sys.argv) == 1 else 2
        script = resolve(args[0])
        if "--dry-run" in args[1:] and not re.search(r"dry[-_]run", script.read_text(encoding="utf-8")):  # no option of the script's own
            dry = True
            args.remove("--dry-run")
        made = plan(script, args[1:], nproc, timeout=timeout)
    except (LaunchError, MeshError, ClusterError) as error:
        print(f"lf: {error}", file=sys.stderr)
        return 2
    if dry:
        print(text(made))
        return 0
    if {"-h", "--help"} & set(args[1:]):  # one process can say that, and at once
        env = {**os.environ, **made.env}
        env.pop("LF_RANK_LOGS")
        os.execve(sys.executable, [sys.executable, "-m", "lf.worker", str(script), *args[1:]], env)
    from lf.supervise import attend  # not needed to answer a question

    return attend(made.command, {**os.environ, **made.env}, made.logs, made.ranks, made.torchrun)


if __name__ == "__main__":
    sys.exit(main())
