"""Do several chains give the same numbers, wherever they lie and however they are placed? Law 1 in float64, of a model of an encoder, a decoder and
a head; on ranks simulated in one process, or on real ones where there are several.

    scripts/launch parity_chains --device cpu --decoder pp=2 --vision dp=2 --head dp=1@1
    scripts/launch parity_chains --device cpu --decoder pp=2,tp=2 --vision dp=4 --head tp=2@2-3 --place nested --place decoupled --schedule zb-h1
    scripts/launch --nproc 2 parity_chains --device cuda --decoder pp=2 --vision tp=2 --head dp=1@1

Exit code 0: all agree. 1: some quantity disagrees. 2: it could not run, whatever the reason, or none of the placements goes on these meshes.
"""

import os
import re
import sys
from typing import Annotated, Any

import attrs
import torch.distributed as dist
import tyro

import lf
from lf.config import ConfigError, one_of
from lf.models.trio import trio
from lf.models.trio_data import sample
from lf.schedule.beside import KINDS, Beside
from lf.schedule.named import SCHEDULES

LOGS = "runs/parity_chains"


@attrs.frozen
class Config:
    decoder: str = "pp=2"  # its mesh, and after @ its ranks, as 0-3 or 0,1; all without
    vision: str = "dp=2"  # the encoder's
    head: str = "dp=1@1"
    place: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # of the encoder: inline, decoupled, nested, dedicated; all that go, without
    head_place: str = "inline"  # or dedicated
    schedule: str = "1f1b"  # of the decoder
    chunks: int | None = None  # stages of the decoder on each rank of pp; those of the schedule without
    in_flight: int | None = None  # of nested and dedicated: units of the encoder between forward and backward
    freeze: tuple[str, ...] = ()  # not trained, as vision.* or decoder.embed
    shard: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # of state over dp, as decoder=3 or vision=1,ranks=2
    microbatches: int = 3
    seed: int = 0
    device: str | None = None


def main(config: Config) -> None:
    screen, device = lf.console.console(), lf.devices.get(config.device)
    live = int(os.environ.get("WORLD_SIZE", "1")) > 1
    lf.config.at_least(1, config, "microbatches")
    for kind in config.place:
        one_of("value for --place:", kind, KINDS)
    one_of("value for --schedule:", config.schedule, SCHEDULES)
    axes = lf.connect(lf.Mesh(), device) if live else None
    say = screen.print if axes is None or not axes.rank else lambda *args, **kwargs: None
    schedule = SCHEDULES[config.schedule]
    places = {name: placed(getattr(config, name), name, config.freeze) for name in ("vision", "decoder", "head")}
    for asked in config.shard:
        name, _, sharding = asked.partition("=")
        places[one_of("chain in --shard:", name, places)] = attrs.evolve(places[name], sharding=lf.sharding.Sharding.parse(sharding))
    mesh = places["decoder"].mesh
    places["decoder"] = attrs.evolve(places["decoder"], placement=schedule.place(mesh.pp, config.chunks or schedule.chunks))
    model, ok, compared = trio(), True, 0

    def data(step: int, i: int, multiple: int) -> lf.Batch:
        return sample(model.config, config.seed + step, i, 0, multiple)

    def run(world: lf.Mesh, fn: Any, *args: Any) -> list[Any]:
        """fn on every real rank; what each gave, on each."""
        if axes is None or world.size == 1:
            return lf.sim.spmd(world, fn, *args)
        out: list[Any] = [None] * axes.mesh.size
        dist.all_gather_object(out, fn(axes, *args))
        return out

    for kind in config.place or KINDS:
        head, in_flight = config.head_place, config.in_flight if kind in ("nested", "dedicated") else None

        def program(layouts: Any, count: int, kind: str = kind, head: str = head, in_flight: Any = in_flight) -> lf.schedule.Program:
            if axes is not None and layouts.world not in (1, axes.mesh.size):
                raise ConfigError(f"the chains lie on {layouts.world} ranks, there are {axes.mesh.size}: start with --nproc {layouts.world}")
            chosen: dict[str, Beside | str] = {"vision": Beside(kind, in_flight=in_flight), "head": head}
            return lf.schedule.build_chains(layouts, count, chosen, schedule.generate)

        def single(layouts: Any, count: int) -> lf.schedule.Program:
            return lf.schedule.build_chains(layouts, count, {"vision": "inline", "head": "inline"})

        about = f"encoder {kind}, head {head}, {config.schedule}"
        try:
            report = lf.parity.compare_chains(
                model, places, data, program, single, microbatches=config.microbatches, seed=config.seed, device=device.NAME, spmd=run
            )  # fmt: skip
        except lf.schedule.ProgramError as error:
            if config.place:
                raise
            say(f"left out: {about}: {str(error).splitlines()[0]}", soft_wrap=True, markup=False)
            continue
        ok, compared = ok and report.ok, compared + 1
        words = attrs.evolve(report, about=about)
        say(f"{'ok' if report.ok else 'DISAGREES'}: {words}", style=None if report.ok else "red", markup=False, soft_wrap=True)
    if not compared:
        raise ConfigError("nothing was compared, every placement was left out; change the meshes or their ranks, --head-place, or --schedule")
    if not ok:
        sys.exit(1)


def placed(text: str, chain: str, freeze: tuple[str, ...]) -> lf.Place:
    """'dp=2@0-1' → a place; what is frozen goes to the chain that its name begins with."""
    mesh, at, ranks = text.partition("@")
    frozen = tuple(name for name in freeze if name.startswith(f"{chain}."))
    if unknown := [name for name in freeze if name.partition(".")[0] not in ("vision", "decoder", "head")]:
        raise ConfigError(f"--freeze {unknown[0]}: begin with the chain, as vision.*, decoder.* or head.*")
    if not at:
        return lf.Place(lf.Mesh.parse(mesh), frozen=frozen)
    numbers: list[int] = []
    for word in ranks.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word.strip())
        if not found:
            raise ConfigError(f"--{chain} {text}: {word!r} should be a rank or a range of ranks, as 0-3")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return lf.Place(lf.Mesh.parse(mesh), tuple(numbers), frozen=frozen)


if __name__ == "__main__":
    lf.cli.judge(main, Config)
