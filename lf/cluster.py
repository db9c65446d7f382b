"""How many ranks this job has and which of them are here: read from what a cluster's launcher left in the environment. No torch.

Nothing there: one machine, and the mesh says how many ranks. A launcher that has started every rank itself (RANK and WORLD_SIZE, or srun) or
one process per machine (NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, or the same with PET_ before them) fixes the number.
"""

from __future__ import annotations

import glob
import re
import shutil
import subprocess
from collections.abc import Mapping

import attrs

DEVICE_FILES = {"cuda": "/dev/nvidia[0-9]*", "kunlun": "/dev/xpu[0-9]*"}


class ClusterError(ValueError):
    """An environment that says something about a cluster, but not enough."""


@attrs.frozen
class Cluster:
    """`world`: ranks in all, None when nothing fixes it. `rank`: this process is that rank. `torchrun`: what it is told about the machines."""

    world: int | None = None
    rank: int | None = None
    env: dict[str, str] = attrs.field(factory=dict)  # what a rank needs and the cluster did not set
    torchrun: tuple[str, ...] = ("--standalone", "--local-addr", "127.0.0.1")  # some machines cannot resolve their own name
    first: int = 0  # the first global rank on this machine
    here: int | None = None  # ranks on this machine
    job: str | None = None  # the same on every machine


def find(env: Mapping[str, str]) -> Cluster:
    """The cluster that this environment describes. Raises ClusterError naming the variable that is missing."""
    nodes = {name: env.get(f"PET_{name}", env.get(name)) for name in ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")}
    if nodes["NNODES"] and "LOCAL_RANK" not in env:
        return _one_per_machine(nodes, env)
    if "RANK" in env and "WORLD_SIZE" in env:
        local = env.get("LOCAL_RANK", "0")
        return Cluster(
            world=int(env["WORLD_SIZE"]), rank=int(env["RANK"]), env={"LOCAL_RANK": local}, first=int(env["RANK"]), here=1,
            job=env.get("TORCHELASTIC_RUN_ID") or env.get("SLURM_JOB_ID"),
        )
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return _slurm(env)
    return Cluster()


def _one_per_machine(nodes: Mapping[str, str | None], env: Mapping[str, str]) -> Cluster:
    if not (nodes["NNODES"] or "").isdigit():
        raise ClusterError(f"NNODES={nodes['NNODES']} is no whole number; a range of machines will not do, a mesh has a fixed size")
    machines, each = int(nodes["NNODES"] or 1), nodes["NPROC_PER_NODE"] or ""
    if not each.isdigit():
        raise ClusterError(f"NNODES={machines} is set, so NPROC_PER_NODE must be the number of ranks on each machine; it is {each or 'not set'}")
    if machines == 1:
        return Cluster(world=int(each), here=int(each))
    for name in ("NODE_RANK", "MASTER_ADDR"):
        if not nodes[name]:
            raise ClusterError(f"NNODES={machines} is set but {name} is not (nor PET_{name}): it says how the machines meet")
    at = int(nodes["NODE_RANK"] or 0)
    how = ("--nnodes", str(machines), "--node-rank", str(at), "--master-addr", nodes["MASTER_ADDR"] or "",
           "--master-port", nodes["MASTER_PORT"] or "29500")
    job = env.get("PET_RDZV_ID") or env.get("SLURM_JOB_ID")
    return Cluster(world=machines * int(each), torchrun=how, first=at * int(each), here=int(each), job=job)


def _slurm(env: Mapping[str, str]) -> Cluster:
    ranks, rank = int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"])
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", ""))
    if not address:
        raise ClusterError(
            f"SLURM_NTASKS={ranks} but this is no step of srun (SLURM_STEP_NODELIST is not set): start it as `srun scripts/launch ...`, "
            f"or set MASTER_ADDR to the first machine"
        )
    job = env.get("SLURM_JOB_ID", "0")
    port = env.get("MASTER_PORT") or str(15000 + (int(job) * 7 + int(env.get("SLURM_STEP_ID", "0"))) % 40000)
    here = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # "4(x2)": as many on every machine
    rest = {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": here.group() if here else "1", "MASTER_ADDR": address, "MASTER_PORT": port,
    }
    return Cluster(world=ranks, rank=rank, env=rest, first=rank, here=1, job=f"{job}.{env.get('SLURM_STEP_ID', '0')}")


def first_host(hosts: str) -> str:
    """'gpu[03-06,9]-ib,x1' → 'gpu03-ib'."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", hosts).split(",")[0]


def count_devices(device: str, env: Mapping[str, str]) -> int:
    """Accelerators that this job may use on this machine; 0 when none is found."""
    if (visible := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))  # the driver stops reading there, too
    if found := len(glob.glob(DEVICE_FILES.get(device, ""))):
        return found
    if device == "cuda" and (smi := shutil.which("nvidia-smi")):
        listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False).stdout
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    return 0
