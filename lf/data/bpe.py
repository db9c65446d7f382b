"""A byte-level BPE tokenizer (Sennrich et al. 2016, arXiv 1508.07909; on bytes: Radford et al. 2019) from the text at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lf.data.files import DataError, new_folder

EOS = "<|endoftext|>"
SMALLEST = 256 + 1  # every byte and EOS


def train_bpe(documents: Iterable[str], vocab_size: int, folder: str | os.PathLike[str], exact: bool = True) -> Path:
    """Train on the documents and write a Hugging Face tokenizer folder; returns it. Any text encodes, and decodes to itself.

    The same documents in the same order give the same files; they are read once, one after another. A text with too little in it for `vocab_size`
    tokens gives fewer, which `load_tokenizer(folder).vocab_size` counts, or with `exact` a DataError. Raises FileExistsError when the folder is
    there: open that with `load_tokenizer`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise DataError(f"vocab_size={vocab_size} is below {SMALLEST}: byte-level BPE has the 256 bytes and {EOS}")
    with new_folder(folder) as part:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(_texts(documents), trainer)
        size = tokenizer.get_vocab_size()
        if exact and size != vocab_size:
            raise DataError(
                f"the text gives {size} tokens ({size - SMALLEST} merges), fewer than vocab_size={vocab_size}; "
                f"give more text, vocab_size={size}, or exact=False"
            )
        tokenizer.save(str(part / "tokenizer.json"))
        special = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,  # decoding gives back the text, spaces before punctuation included
            **special,
        }
        for name, content in {"tokenizer_config.json": about, "special_tokens_map.json": special}.items():
            (part / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _texts(documents: Iterable[str]) -> Iterator[str]:
    if isinstance(documents, str):
        raise DataError("documents are a list of strings, not one string; wrap it in a list")
    for i, text in enumerate(documents):
        if not isinstance(text, str):
            raise DataError(f"document {i} is {type(text).__name__}, not text; filter or convert it first")
        yield text
