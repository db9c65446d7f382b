"""From a command line to a config to a function: what every script ends with."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import tyro

from lf.config import ConfigError, read


def run(main: Callable[..., Any], kind: type | None = None) -> None:
    """Calls `main` with what the command line says.

    kind: an attrs config, made of --field value, and of --config FILE (JSON) to start from; without one, main's own arguments are the flags.
    An error that is the user's (a mesh that cannot be, a missing file) ends with one message and exit code 1; any other with its traceback.
    """
    speak = os.environ.get("RANK", "0") == "0"
    about = sys.modules["__main__"].__doc__
    try:
        if kind is None:
            tyro.cli(main, description=about, console_outputs=speak)
        else:
            file, args = _config_file(sys.argv[1:])
            start = tyro.MISSING_NONPROP if file is None else read(kind, file)
            main(tyro.cli(kind, args=args, default=start, description=about, console_outputs=speak))
    except ValueError as error:
        if not type(error).__module__.startswith("lf."):
            raise
        raise SystemExit(f"error: {error}") from None
    if dist.is_initialized():
        dist.destroy_process_group()


def judge(main: Callable[..., Any], kind: type | None = None) -> None:
    """`run` for a script whose exit code 1 is a verdict: whatever else keeps it from one ends with 2, a crash with its traceback."""
    try:
        run(main, kind)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            end.code = 2
        raise
    except Exception:
        traceback.print_exc()
        sys.exit(2)


def _config_file(args: list[str]) -> tuple[str | None, list[str]]:
    for i, word in enumerate(args):
        if word == "--config":
            if i + 1 == len(args):
                raise ConfigError("--config needs the name of a JSON file")
            return args[i + 1], args[:i] + args[i + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], args[:i] + args[i + 1 :]
    return None, args
