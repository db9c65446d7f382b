"""What --data names: files of text, of records and of indexed tokens, each found by its path, a folder or a glob, with or without a weight."""

from __future__ import annotations

import difflib
import glob
import math
import os
from collections.abc import Sequence

import attrs

from lf.data.files import DataError

Path = str | os.PathLike[str]
KINDS = {
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    "parquet": (".parquet",),
    "indexed": (".idx", ".bin"),
}  # any other file is text, and a folder that datasets.save_to_disk wrote is of kind "dataset"
IN_FOLDERS = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".idx")  # what a folder is searched for


@attrs.frozen
class Source:
    """What is read as one."""

    name: str  # as it was given
    weight: float | None
    files: tuple[str, ...]  # of text or records, and data sets saved by datasets
    prefixes: tuple[str, ...]  # of indexed tokens


def find_sources(words: Sequence[str], match: str | None = None) -> list[Source]:
    """The sources of the words of --data: PATH, or WEIGHT:PATH, where a path is whatever `find_files` takes.

    Either all have a weight or none has. With weights each word is a source; without, all words together are one. A path with a colon in it is
    taken as it stands where it exists. Raises DataError that lists every path that is missing or matches nothing."""
    if isinstance(words, str):
        raise DataError(f"data={words!r} must be a list of words, such as [{words!r}]")
    parsed = [_weighted(word) for word in words]
    without = [path for weight, path in parsed if weight is None]
    if without and len(without) < len(parsed):
        raise DataError(f"{', '.join(without)} without a weight, while others have one; write 0.3:{without[0]}, or give none of them a weight")
    groups = [(weight, [path]) for weight, path in parsed] if not without and parsed else [(None, without)]
    found, wrong = [], []
    for weight, paths in groups:
        try:
            files = find_files(paths, match)
        except DataError as error:
            wrong.append(str(error))
            continue
        prefixes = tuple(os.path.splitext(f)[0] for f in files if kind(f) == "indexed")
        found.append(Source(" ".join(paths), weight, tuple(f for f in files if kind(f) != "indexed"), prefixes))
    if wrong:
        raise DataError("; ".join(wrong))
    return found


def find_files(paths: Path | Sequence[Path], match: str | None = None) -> list[str]:
    """Absolute paths of the files that `paths` name, sorted, so that their order is no matter of the file system.

    A path is a file, a glob, a prefix of indexed tokens (which gives PREFIX.idx), or a folder. A folder that datasets.save_to_disk wrote is taken
    as it is; any other is read as the glob `folder/**/match`, hidden files left out as in every glob, without `match` as that of every text, JSONL,
    Parquet and indexed file: all of one kind, or the folder is refused. A file that several paths or links reach is read once. Raises DataError
    that lists every path that is missing or matches nothing."""
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise DataError("no data was named: give at least one file, folder or glob")
    found: dict[str, str] = {}
    wrong = []
    for name in names:
        if not os.fspath(name).strip("\0 "):
            raise DataError(f"a path of the data is empty: {name!r}")
        path = os.path.abspath(os.path.expanduser(name))
        try:
            hits = _expand(path, match)
        except DataError as error:
            wrong.append(str(error))
            continue
        found |= {hit: os.path.realpath(hit) for hit in hits}
        if os.path.isdir(path) and not hits:
            asked = f"file that matches {match!r}" if match else f"{', '.join(IN_FOLDERS[:-1])} or {IN_FOLDERS[-1]} file"
            wrong.append(f"folder {path} has no {asked}; give match=, such as match='*.md'")
        elif not hits:
            wrong.append(f"glob {path} matches no file" if glob.has_magic(path) else f"{path} does not exist{_near(path)}")
    if wrong:
        raise DataError("; ".join(wrong))
    first: dict[str, str] = {}
    for hit in sorted(found):
        first.setdefault(found[hit], hit)
    return list(first.values())


def kind(file: str) -> str:
    """text, jsonl, parquet, indexed or dataset."""
    if os.path.isdir(file):
        return "dataset"
    return next((name for name, ends in KINDS.items() if file.lower().endswith(ends)), "text")


def _weighted(word: str) -> tuple[float | None, str]:
    head, colon, path = word.partition(":")
    try:
        weight = float(head)
    except ValueError:
        return None, word
    if not colon or not path:
        return None, word
    if _there(word):
        if _there(path):
            raise DataError(f"{word} is a file, and {path} with the weight {head} as well; write ./{word} or {head}:./{path}")
        return None, word
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{word}: the weight {head} must be a positive number; leave a source out to read none of it")
    return weight, path


def _near(path: str) -> str:
    folder, name = os.path.split(path)
    near = difflib.get_close_matches(name, os.listdir(folder), n=1) if os.path.isdir(folder) else []
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""


def _there(path: str) -> bool:
    path = os.path.expanduser(path)
    return os.path.exists(path) or _prefix(path)


def _prefix(path: str) -> bool:
    return os.path.isfile(path + ".idx") and os.path.isfile(path + ".bin")


def _expand(path: str, match: str | None) -> list[str]:
    if _prefix(path):
        if os.path.exists(path):
            raise DataError(f"{path} is there, and so is {path}.idx; write {path}.idx or {os.path.join(path, '*')}")
        return [path + ".idx"]
    if os.path.isfile(path):
        return [_index(path)]
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "dataset_dict.json")):
            names = sorted(entry for entry in os.listdir(path) if os.path.isdir(os.path.join(path, entry)))
            raise DataError(f"{path} holds several data sets; name one: {', '.join(os.path.join(path, name) for name in names)}")
        if all(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "state.json")):
            return [path]
        hits = [hit for hit in glob.iglob(os.path.join(glob.escape(path), "**", match or "*"), recursive=True) if os.path.isfile(hit)]
        if match:
            return [_index(hit) for hit in hits]
        hits = [hit for hit in hits if hit.lower().endswith(IN_FOLDERS)]
        if len(kinds := {kind(hit): hit for hit in hits}) > 1:
            shown = " and ".join(sorted(kinds.values()))
            raise DataError(f"folder {path} has files of several kinds, such as {shown}; say which are meant, as {os.path.join(path, '*.txt')}")
        return hits
    hits = glob.glob(path, recursive=True) if glob.has_magic(path) else []
    files = [file for hit in hits for file in ([_index(hit)] if os.path.isfile(hit) else _expand(os.path.abspath(hit), match))]
    return [file for file in files if not (file.endswith(".json") and _prefix(file[: -len(".json")]))]  # what is said of indexed tokens


def _index(file: str) -> str:
    """PREFIX.idx for PREFIX.bin."""
    return file[: -len(".bin")] + ".idx" if file.lower().endswith(".bin") else file
