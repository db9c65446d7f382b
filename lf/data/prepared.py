"""From what --data names to what a run reads: a tokenizer, and documents of tokens. Each is made once and found again by what it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console

from lf.console import Bar, console
from lf.data.bpe import SMALLEST, train_bpe
from lf.data.files import DataError, new_folder
from lf.data.indexed import Documents, blocks, open_documents
from lf.data.reading import IDS, Reading
from lf.data.records import fingerprint_of, has_ids, pieces, read
from lf.data.sources import Source, find_sources
from lf.data.tokenizer import Tokenizer, load_tokenizer
from lf.data.tokenizing import Counts, Recipe, known_eod, left_out, tokenize
from lf.runs import on_first_rank

LARGEST = 32768  # tokens that a BPE has unless one asks for more: large enough for one language, quick to train
FORMAT = 2  # of the cache; raise it when the same input gives other tokens


@attrs.frozen(eq=False)
class Corpus:
    """Documents to read, and how often: `weight` is their share of all rows, next to the weights of the others."""

    name: str
    weight: float
    documents: Documents


def look(data: Sequence[str], held_out: Mapping[str, str], match: str | None, axes: Any) -> None:
    """Raises DataError on every rank when the words of --data, or one of the sets {name: path}, name something that is not there. Reads nothing."""

    def each() -> None:
        find_sources(data, match)
        for name, path in held_out.items():
            if any(source.weight is not None for source in find_sources((path,), match)):
                raise DataError(f"{name}={path}: a set has no weight, every token of it is read once; give each source a name of its own")

    on_first_rank(each, axes)


def prepare(
    data: Sequence[str],
    folder: str | Path,
    vocab: int,
    axes: Any,
    tokenizer: str | None = None,
    bpe_vocab: int | None = None,
    match: str | None = None,
    text_column: str = "text",
    on_bad: str = "stop",
    eod: str = "auto",
    may_train: bool = True,
) -> tuple[list[Corpus], Path | None]:
    """What the words of --data name, and the folder of its tokenizer: made by rank 0 below `folder` where they are not there yet. Collective.

    data, match: as in `find_sources`; without weights a token of any source is read as often as one of any other. vocab: the model's. tokenizer: a
    Hugging Face tokenizer folder; without one a BPE of at most `bpe_vocab` tokens is trained on the texts (None: min(vocab, 32768)), of fewer where
    they have too little in them: the model's other rows stay unused. Where all is tokens already, no tokenizer is needed, and None is returned
    without one. Texts beside tokens, or with `may_train` false, need the tokenizer that the others were made
    with. text_column, on_bad: as in `Reading`; eod: as in `Recipe`. Raises DataError, before anything is read where that is possible.
    """
    if tokenizer is not None and bpe_vocab is not None:
        raise DataError(f"bpe_vocab={bpe_vocab} is for a BPE that is trained here, and tokenizer={tokenizer!r} was given: leave one of them out")
    size = min(vocab, LARGEST) if bpe_vocab is None else bpe_vocab
    if tokenizer is None and bpe_vocab is not None and not SMALLEST <= size <= vocab:
        raise DataError(f"bpe_vocab={size} must lie between {SMALLEST}, the bytes and one end of text, and the model's vocabulary of {vocab}")
    known_eod(eod)
    root, screen, how = Path(folder), console(axes.rank), Reading(text_column, on_bad, vocab)

    def make() -> dict[str, Any]:
        used = None if tokenizer is None else load_tokenizer(tokenizer)
        if used and used.vocab_size > vocab:
            raise DataError(f"tokenizer {tokenizer} has ids up to {used.vocab_size - 1}, the model's vocabulary is {vocab}")
        sources = find_sources(data, match)
        texts = [s for s in sources if s.files and not has_ids(s.files)]
        if texts and used is None:
            if not may_train or len(texts) < len(sources) or any(s.prefixes for s in sources):
                why = "a BPE that is trained here would give other ids than those of the tokens beside them"
                raise DataError(f"{texts[0].name} is text, and no tokenizer was given: {why}; give theirs with --tokenizer")
            if not SMALLEST <= size <= vocab:
                raise DataError(f"bpe_vocab={size} must lie between {SMALLEST}, the bytes and one end of text, and the model's vocabulary of {vocab}")
            used = load_tokenizer(_bpe([f for s in texts for f in s.files], how, size, root / "tokenizer", screen))
        found = []
        for source in sources:
            prefixes = [(str(Path(p).name), p) for p in source.prefixes]
            if source.files:
                recipe = Recipe(how if source in texts else attrs.evolve(how, column=IDS), str(used.folder) if used else None, eod)
                prefixes.insert(0, (source.name, str(_tokens(source, recipe, used, root / "tokens", screen))))
            elif eod == "append":
                raise DataError(f"eod='append' cannot change the indexed tokens of {source.name}: leave it out, or write them anew")
            opened = [(name, prefix, _fits(open_documents(prefix), vocab, used)) for name, prefix in prefixes]
            total = sum(len(documents.tokens) for *_, documents in opened)
            for name, prefix, documents in opened:
                share = len(documents.tokens) / total
                found.append((name, share * (1.0 if source.weight is None else source.weight), prefix, documents.fingerprint))
        return {"found": found, "tokenizer": used and str(used.folder)}

    made = on_first_rank(make, axes)
    corpora = _opened(made["found"], axes)
    return corpora, made["tokenizer"] and Path(made["tokenizer"])


def _fits(documents: Documents, vocab: int, tokenizer: Tokenizer | None) -> Documents:
    if tokenizer and documents.tokenizer not in (None, tokenizer.fingerprint):
        raise DataError(f"{documents.prefix} was made with another tokenizer than {tokenizer.folder}: give the one that made it, or tokenize again")
    if documents.vocab_size is not None and documents.vocab_size > vocab:
        raise DataError(f"{documents.prefix} was made with a vocabulary of {documents.vocab_size}, the model's is {vocab}")
    if documents.vocab_size is None:  # nobody says what it was made with: some of its ids do
        for begin, stop in blocks(len(documents.tokens)):
            ids = documents.tokens[begin:stop]
            if (most := int(ids.max())) >= vocab or int(ids.min()) < 0:
                wrong = most if most >= vocab else int(ids.min())
                raise DataError(f"{documents.prefix} has id {wrong}, outside 0 … {vocab - 1}, the model's vocabulary: was it made for another one?")
    return documents


def _opened(found: list[tuple[str, float, str, str]], axes: Any) -> list[Corpus]:
    """What rank 0 has found, on this rank. Raises on all when one does not find it, or something else under its name."""
    problem, corpora = "", []
    try:
        for name, weight, prefix, fingerprint in found:
            documents = open_documents(prefix)
            if documents.fingerprint != fingerprint:
                raise DataError(f"{prefix} on rank {axes.rank} is not what it is on rank 0: give every machine the same files")
            corpora.append(Corpus(name, weight, documents))
    except DataError as error:
        problem = str(error)
    if int(axes.world.sum(torch.tensor(int(bool(problem))))):
        raise DataError(problem or "another rank cannot open what rank 0 has found; is it on a disk that all machines see?")
    return corpora


def _tokens(source: Source, recipe: Recipe, tokenizer: Tokenizer | None, cache: Path, screen: Console) -> Path:
    """The indexed tokens of a source's files: a folder in `cache` named by what they are made of."""
    how = recipe.how
    made_of = f"lf documents {FORMAT} {tokenizer.fingerprint if tokenizer else None} {how.column} {how.on_bad} {recipe.eod}"
    if tokenizer is None or how.column == IDS:
        made_of += f" {how.vocab}"
    folder = cache / fingerprint_of(source.files, made_of)
    if not folder.is_dir():
        try:
            with new_folder(folder) as part, percent(screen, "tokenizing") as bar:
                tokenize(source.files, recipe, part / "documents", progress=bar)
        except FileExistsError:
            pass  # another process was quicker: its folder has the same content, or open_documents says what is wrong with it
    if words := left_out(folder / "documents"):
        screen.print(f"{source.name}: {words}", soft_wrap=True)
    return folder / "documents"


def _bpe(files: Sequence[str], how: Reading, size: int, cache: Path, screen: Console) -> Path:
    """The BPE of at most `size` tokens of these texts: a folder in `cache` named by both, so that no other text or size finds it."""
    folder = cache / fingerprint_of(files, f"lf bpe {size} {how.column} {how.on_bad}")
    if folder.is_dir():
        return folder

    def texts() -> Iterator[str]:
        work = pieces(files)
        counts = Counts(total=sum(p.size for p in work))
        with percent(screen, "reading texts for a BPE", "documents") as bar:
            for piece in work:
                for part in read(piece, how):
                    yield from part.documents
                    counts = attrs.evolve(counts, documents=counts.documents + len(part.documents), read=counts.read + part.read)
                    bar(counts)
        # tokenizers gives no sign of life while it merges
        screen.print(f"learning the merges of a BPE of up to {size} tokens, without a bar")

    try:
        train_bpe(texts(), size, folder, exact=False)
    except FileExistsError:
        return folder  # another process was quicker
    screen.print(f"the BPE has {load_tokenizer(folder).vocab_size} tokens, in {folder}", soft_wrap=True)
    return folder


@contextmanager
def percent(screen: Console, what: str, unit: str = "tokens") -> Iterator[Callable[[Counts], None]]:
    """A live bar of how much of some files is read, in percent of their bytes: how many documents they have is not known before."""
    began, last = time.monotonic(), -1

    def at(counts: Counts) -> None:
        nonlocal last
        done = min(100 * counts.read // max(counts.total, 1), 100)
        if done > last:
            last, speed = done, counts.read / 1e6 / max(time.monotonic() - began, 1e-9)
            bar.at(done, values={unit: f"{getattr(counts, unit):,}", "MB/s": f"{speed:,.1f}"})

    with Bar(screen, f"{what} %", 100) as bar:
        yield at
