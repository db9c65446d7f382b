"""What the name of a model means: a preset, a folder, or a repository on the Hugging Face hub. One that could be two of these is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lf.axes import solo
from lf.checkpoint import hub
from lf.checkpoint.hub import Repo
from lf.config import ConfigError, one_of
from lf.models.presets import PRESETS

PRESET = "preset:"
Source = str | os.PathLike[str]


def meaning(source: Source) -> str | Path | Repo:
    """A preset's name (as "qwen3-0.6b", or "preset:qwen3-0.6b"), a folder's path, or a repository (as "org/name", or "org/name@revision").

    A path that is no str is a folder, and so is what begins with "/", "./", "../" or "~", or has any other form. Raises ConfigError for a name
    that is a preset or of the form of a repository, and a folder as well: it shows how to say each.
    """
    if not isinstance(source, str):
        return Path(source).expanduser()
    if source.startswith(PRESET):
        return one_of("preset", source.removeprefix(PRESET), PRESETS)
    there, repo = Path(source).is_dir(), hub.parse(source)
    if source in PRESETS:
        if there:
            raise ConfigError(f"{source!r} is a preset, and a folder here; write {PRESET}{source} for the preset, ./{source} for the folder")
        return source
    if repo is None:
        return Path(source).expanduser()
    if there:
        other = f"{repo} for the repository" if "@" not in source else "a commit after the @ for the repository"
        raise ConfigError(f"{source!r} is a folder here, and the form of a repository on the hub; write ./{source} for the folder, {other}")
    return repo


def folder(source: Source, axes: Any = None, weights: bool = True, tokenizer: bool = True) -> Path:
    """The local folder of a model: the folder itself, or of a repository on the hub the snapshot, fetched once on each node. Collective.

    A snapshot has config.json, and on demand weights and the files of the tokenizer. axes: of the ranks that call (None: this process alone).
    Raises ConfigError on every rank: for a preset, which is a shape without files, and for what the hub does not give.
    """
    meant = meaning(source)
    if isinstance(meant, Repo):
        return hub.fetch(meant, solo() if axes is None else axes, weights, tokenizer)
    if isinstance(meant, str):
        raise ConfigError(f"{source!r} is a preset: a shape, without weights or tokenizer; give a folder or a repository on the hub, as org/name")
    return meant
