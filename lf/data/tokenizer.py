"""A tokenizer is a Hugging Face tokenizer folder: text → ids → text, and the id that ends a document."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lf.data.files import DataError

if TYPE_CHECKING:
    import tokenizers


@attrs.frozen(eq=False)
class Tokenizer:
    """An open tokenizer folder. No template tokens are added: a document's only addition is the `eos` that `tokenize` puts at its end.
    The name of a special token inside a text, such as `<|endoftext|>`, is that token, as in transformers."""

    folder: Path
    vocab_size: int  # the largest id + 1: the fewest rows an embedding may have
    eos: int
    fingerprint: str  # of tokenizer.json and eos: equal fingerprints give equal ids
    backend: tokenizers.Tokenizer = attrs.field(repr=False)

    def encode(self, texts: list[str]) -> list[list[int]]:
        # the fast form gives the same ids and leaves out the character offsets, most of the memory
        encode = getattr(self.backend, "encode_batch_fast", self.backend.encode_batch)
        return [e.ids for e in encode(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Open a folder with tokenizer.json. Raises DataError when that file or the end-of-document token is missing."""
    from tokenizers import Tokenizer as Backend

    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        if not folder.is_dir():
            raise DataError(f"tokenizer folder {folder} does not exist")
        raise DataError(
            f"{folder} has no tokenizer.json; write one with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}, use_fast=True).save_pretrained({str(folder)!r})"
        )
    content = file.read_bytes()
    try:
        backend = Backend.from_str(content.decode())
    except Exception as error:  # tokenizers raises the bare class
        raise DataError(f"{file} is not a tokenizer that tokenizers can read: {error}") from error
    # some files carry these settings from inference: they would cut or lengthen documents
    backend.no_truncation()
    backend.no_padding()
    vocab = backend.get_vocab(with_added_tokens=True)
    if not vocab:
        raise DataError(f"{file} has an empty vocabulary")
    eos = _find_eos(folder, vocab)
    fingerprint = hashlib.blake2b(content + f"\neos {eos}".encode(), digest_size=16).hexdigest()
    return Tokenizer(folder, max(vocab.values()) + 1, eos, fingerprint, backend)


# where a folder may say which token ends a document; the first that does counts
_PLACES = (
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("config.json", "eos_token_id"),
    ("generation_config.json", "eos_token_id"),  # the model's files name the id, the tokenizer's the token
)


def _find_eos(folder: Path, vocab: dict[str, int]) -> int:
    for name, key in _PLACES:
        value = _read_json(folder / name).get(key)
        value = value.get("content") if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) and value else value  # several ends of a turn: the first is the model's own
        if value is None:
            continue
        eos = vocab.get(value, -1) if isinstance(value, str) else value
        if not isinstance(eos, int) or eos not in vocab.values():
            raise DataError(f"{folder / name}: {key} is {value!r}, which is not in the vocabulary of tokenizer.json")
        return eos
    raise DataError(
        f"{folder} names no end-of-document token: put \"eos_token\": \"…\" into tokenizer_config.json "
        f"(looked in {', '.join(name for name, _ in _PLACES)})"
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} holds a {type(value).__name__}, not an object with named fields")
    return value
