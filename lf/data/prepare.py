"""From text files to what a run reads: a tokenizer, and documents of tokens. Each is made once and found again by what it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lf.console import Bar, console
from lf.data.bpe import SMALLEST, train_bpe
from lf.data.documents import Documents, fingerprint_of, open_documents, tokenize
from lf.data.files import DataError
from lf.data.text import read_text
from lf.data.tokenizer import load_tokenizer
from lf.runs import on_first_rank

if TYPE_CHECKING:
    from datasets import Dataset

LARGEST = 32768  # tokens that a BPE has unless one asks for more: large enough for one language, quick to train


def prepare(
    data: Sequence[str],
    folder: str | Path,
    vocab: int,
    axes: Any,
    tokenizer: str | None = None,
    bpe_vocab: int | None = None,
    match: str = "*.txt",
) -> tuple[Documents, Path]:
    """The documents and the folder of their tokenizer, made by rank 0 below `folder` where they are not there yet. Collective.

    data, match: as in `read_text`. vocab: the model's. tokenizer: a Hugging Face tokenizer folder; without one a BPE of at most `bpe_vocab`
    tokens is trained on the text (None: min(vocab, 32768)), of fewer where the text has too little in it: the model's other rows stay unused.
    Raises DataError, before any text is read where that is possible.
    """
    size = min(vocab, LARGEST) if bpe_vocab is None else bpe_vocab
    if tokenizer is not None and bpe_vocab is not None:
        raise DataError(f"bpe_vocab={bpe_vocab} is for a BPE that is trained here, and tokenizer={tokenizer!r} was given: leave one of them out")
    if tokenizer is None and not SMALLEST <= size <= vocab:
        raise DataError(f"bpe_vocab={size} must lie between {SMALLEST}, the bytes and one end of text, and the model's vocabulary of {vocab}")
    root, screen = Path(folder), console(axes.rank)

    def make() -> list[str]:
        given = None if tokenizer is None else load_tokenizer(tokenizer)
        if given and given.vocab_size > vocab:
            raise DataError(f"tokenizer {tokenizer} has ids up to {given.vocab_size - 1}, the model's vocabulary is {vocab}")
        texts = read_text(data, root / "cache", match, say=screen.print)
        used = given or load_tokenizer(_bpe(texts, size, root / "tokenizer", screen))
        with Bar(screen, "tokenizing", len(texts)) as bar:
            documents = tokenize(texts, used, root / "tokens", bar.at, screen.print)
        return [str(documents.folder), str(used.folder)]

    documents, used = on_first_rank(make, axes)
    return open_documents(documents), Path(used)


def _bpe(texts: Dataset, size: int, cache: Path, screen: Console) -> Path:
    """The BPE of at most `size` tokens of these texts: a folder in `cache` named by both, so that no other text or size finds it."""
    folder = cache / fingerprint_of(texts, f"lf bpe {size}")
    if folder.is_dir():
        return folder
    with Bar(screen, "reading documents for a BPE", len(texts)) as bar:

        def progress(done: int, total: int) -> None:
            bar.at(done, total)
            if done == total:  # tokenizers gives no sign of life while it merges
                screen.print(f"learning the merges of a BPE of up to {size} tokens, without a bar")

        train_bpe(texts, size, folder, progress, exact=False)
    screen.print(f"the BPE has {load_tokenizer(folder).vocab_size} tokens, in {folder}", soft_wrap=True)
    return folder
