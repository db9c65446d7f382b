"""Data: text → documents of tokens → a stream of rows → the batches of a step. A run's place in it is one integer, the rows consumed."""

from lf.data.batches import microbatch, microbatches, pack, step_batches
from lf.data.bpe import train_bpe
from lf.data.documents import Documents, open_documents, tokenize
from lf.data.files import DataError
from lf.data.prepare import prepare
from lf.data.stream import Row, Rows, epoch_order, in_order, rows, stream
from lf.data.text import find_files, read_text
from lf.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DataError",
    "Documents",
    "Row",
    "Rows",
    "Tokenizer",
    "epoch_order",
    "find_files",
    "in_order",
    "load_tokenizer",
    "microbatch",
    "microbatches",
    "open_documents",
    "pack",
    "prepare",
    "read_text",
    "rows",
    "step_batches",
    "stream",
    "tokenize",
    "train_bpe",
]
