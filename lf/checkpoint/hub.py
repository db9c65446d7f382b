"""Repositories on the Hugging Face hub: fetched once on each node into the cache of huggingface_hub, then opened there by every rank.

Only what is asked for is fetched: config.json, the files of the tokenizer, the safetensors and their index; never a pickle, never code. The
variables of huggingface_hub count: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. A commit that is in the cache needs no network;
a branch or tag is looked up each time, unless HF_HUB_OFFLINE says to take it as it was last seen: it is never replaced by that in silence.
"""

from __future__ import annotations

import errno
import json
import re
import socket
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from lf.checkpoint.export import INDEX, SINGLE, TOKENIZER
from lf.config import ConfigError
from lf.runs import on_every_rank, once_per_node

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(\S+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@attrs.frozen
class Repo:
    """`revision`: a branch, a tag or a commit."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"


def parse(text: str) -> Repo | None:
    """The repository that a name of the form org/name[@revision] means; None for any other form."""
    found = NAME.fullmatch(text)
    return Repo(found[1], found[2] or "main") if found else None


def fetch(repo: Repo, axes: Any, weights: bool, tokenizer: bool) -> Path:
    """The folder of the repository in this node's cache, with config.json, and weights and tokenizer when asked for. Collective.

    Raises ConfigError on every rank, naming repository, revision and the way out.
    """
    commits = sorted(set(once_per_node(partial(_fetch, repo, weights, tokenizer), axes)))
    if len(commits) > 1:
        raise ConfigError(f"{repo} is {' on one node and '.join(commits)} on another; name the commit that all should have: {repo.name}@{commits[0]}")
    pinned = Repo(repo.name, commits[0])

    def here() -> str:
        if (folder := _cached(pinned)) is None:
            raise ConfigError(f"{pinned} was fetched, but not into the cache of this rank; give all ranks of a node one HF_HOME")
        return str(folder)

    return Path(on_every_rank(here, axes)[axes.rank])


def _fetch(repo: Repo, weights: bool, tokenizer: bool) -> str:
    """Fetches what is not there yet, and returns the commit."""
    from huggingface_hub import constants

    there, lacking = None, ""
    try:
        there = _cached(repo)
        lacking = _lacks(there, weights, tokenizer)
        if there and not lacking and COMMIT.fullmatch(repo.revision):
            return there.name
        if not constants.HF_HUB_OFFLINE:
            return _refresh(repo, weights, tokenizer)
    except ConfigError:
        raise
    except Exception as error:
        if (words := _why(repo, error, there is not None and not lacking)) is None:
            raise
        raise ConfigError(words) from error
    if there is None or (lacking and lacking != TOKENIZER[0]):  # a repository may have no tokenizer: who opens it will say so
        what = f"{repo} is not" if there is None else f"{lacking} of {repo} is not"
        raise ConfigError(f"HF_HUB_OFFLINE is set, and {what} in {constants.HF_HUB_CACHE}; unset it once where there is a network, or give a folder")
    return there.name


def _refresh(repo: Repo, weights: bool, tokenizer: bool) -> str:
    """Asks the hub which commit it is, and fetches of it what is not there yet."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(repo.name, revision=repo.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    commit, files = str(info.sha), {s.rfilename for s in info.siblings or ()}
    _refuse(repo, files, weights)
    wanted = ["config.json", *(TOKENIZER if tokenizer else ()), *((SINGLE, INDEX) if weights else ())]
    folder = _get(repo, commit, [name for name in wanted if name in files])
    if weights and INDEX in files:
        shards = _shards(folder)
        if lost := sorted(shards - files):
            raise ConfigError(f"{repo}: {INDEX} names {lost[0]}, which is not in the repository; choose another revision")
        _get(repo, commit, sorted(shards))
    return commit


def _get(repo: Repo, commit: str, files: list[str]) -> Path:
    """The snapshot of this commit in the cache, with these files."""
    from huggingface_hub import snapshot_download

    folder = _cached(repo)
    if folder is None or folder.name != commit or not all((folder / name).exists() for name in files):
        folder = Path(snapshot_download(repo.name, revision=repo.revision, allow_patterns=files))
    if folder.name != commit or not all((folder / name).exists() for name in files):
        raise ConfigError(f"{repo} changed, or the hub went away, while it was being fetched: start again, or name a commit: {repo.name}@{commit}")
    return folder


def _cached(repo: Repo) -> Path | None:
    """The snapshot in the cache that this revision meant when it was last looked up."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo.name, "config.json", revision=repo.revision)
    return Path(found).parent if isinstance(found, str) else None


def _lacks(folder: Path | None, weights: bool, tokenizer: bool) -> str:
    """A file that is not in a snapshot and would have to be, or ''."""
    if folder is None:
        return "config.json"
    if weights and (folder / INDEX).exists():
        if lost := sorted(name for name in _shards(folder) if not (folder / name).exists()):
            return lost[0]
    elif weights and not (folder / SINGLE).exists():
        return SINGLE
    return "" if not tokenizer or (folder / TOKENIZER[0]).exists() else TOKENIZER[0]


def _shards(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / INDEX} is no JSON object with a weight_map ({type(error).__name__}: {error})") from None


def _refuse(repo: Repo, files: set[str], weights: bool) -> None:
    """What the names of its files say already."""
    if "config.json" not in files:
        raise ConfigError(f"{repo} has no config.json, so it is no model of transformers; choose another repository")
    if weights and {SINGLE, INDEX} <= files:
        raise ConfigError(f"{repo} has both {SINGLE} and {INDEX}; download it, keep the right one, and give the folder")
    if weights and not {SINGLE, INDEX} & files:
        pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth")))
        hint = f" ({pickles[0]} is a pickle, which is never opened)" if pickles else ""
        raise ConfigError(f"{repo} has no safetensors{hint}; choose a revision that has (often refs/pr/1), or convert it and give the folder")


def _why(repo: Repo, error: Exception, cached: bool) -> str | None:
    """One sentence for what the hub or the network did not do, with the way out; None for an error of another kind."""
    from huggingface_hub import constants, errors

    words, hub = " ".join(str(error).split())[:300], constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms on {hub}/{repo.name} and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no model {repo.name} (or not without the right HF_TOKEN), and there is no such folder either; give one that is there"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo.name} has no revision {repo.revision!r}; give a branch, tag or commit that is on {hub}/{repo.name}"
    if isinstance(error, errors.HFValidationError):
        return f"{repo.name!r} is no name of a repository ({words}); give org/name, or a folder that is there"
    if getattr(error, "response", None) is not None:
        return f"{hub} did not give {repo}: {words}"
    if isinstance(error, OSError) and error.errno in DISK:
        return f"cannot write {repo} into {constants.HF_HUB_CACHE} ({words}); make room, or set HF_HOME to a disk that has it"
    if isinstance(error, (OSError, errors.LocalEntryNotFoundError)) or type(error).__module__.split(".")[0] in ("requests", "httpx", "httpx2"):
        way_out = "set HF_HUB_OFFLINE=1 to take what is in the cache" if cached else "fetch it where there is a network, or give a folder"
        return f"cannot reach {hub} for {repo} from {socket.gethostname()} ({type(error).__name__}: {words}); {way_out}"
    return None
