"""From a command line to a config to a function: what every script ends with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
import tyro

from lf.config import ConfigError, read

C = TypeVar("C")


def run(main: Callable[[C], Any], kind: type[C], default: C | None = None) -> None:
    """Calls `main` with the config that the command line makes of `kind`: --field value, and --config FILE for a JSON to start from.

    An error that is the user's (a mesh that cannot be, a missing file) ends with one message and exit code 2; any other with its traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    args = sys.argv[1:]
    try:
        file, args = _config_file(args)
        if file is not None:
            default = read(kind, file)
        start = tyro.MISSING_NONPROP if default is None else default
        config: C = tyro.cli(kind, args=args, default=start, description=sys.modules["__main__"].__doc__, console_outputs=rank == 0)
        main(config)
    except ValueError as error:
        if not type(error).__module__.startswith("lf."):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def _config_file(args: list[str]) -> tuple[str | None, list[str]]:
    for i, word in enumerate(args):
        if word == "--config":
            if i + 1 == len(args):
                raise ConfigError("--config needs the name of a JSON file")
            return args[i + 1], args[:i] + args[i + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], args[:i] + args[i + 1 :]
    return None, args
