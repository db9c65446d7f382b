"""What is malformed (a config, weights, records, flags, a run folder) is one clear error, before a step and with nothing half-written.

Each case goes through the command line of scripts/pretrain.py, once into a new folder and once into that of a run that has trained.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import QWEN3, ROOT, processes
from safetensors.torch import load_file, save_file

import lf
from lf import launch

sys.path.insert(0, str(ROOT / "scripts"))
import pretrain

MODEL = {**QWEN3, "vocab_size": 300}
ROW = '{"text": "def return self import"}\n'
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"
NAN = float("nan")


@attrs.frozen
class Bench:
    """What is well-formed, in `good`, and a folder to make of it what is not."""

    good: Path
    folder: Path

    def file(self, name: str, content: str | bytes = b"") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy(self, name: str) -> Path:
        shutil.copytree(self.good / name, self.folder / name)
        return self.folder / name


Args = list[Any]
Case = Callable[[Bench], Args]
GONE = object()


def config(**changes: Any) -> Case:
    """A model whose config.json has these fields, or has them not."""
    return config_text(json.dumps({k: v for k, v in {**MODEL, **changes}.items() if v is not GONE}))


def config_text(text: str) -> Case:
    return lambda b: ["--model", b.file("model/config.json", text).parent]


def config_folder(b: Bench) -> Args:
    (b.folder / "model" / "config.json").mkdir(parents=True)
    return ["--model", b.folder / "model"]


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Case:
    def case(b: Bench) -> Args:
        folder = b.copy("weights")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return ["--weights", folder, "--tokenizer", b.good / "tokenizer"]

    return case


def files(change: Callable[[Path, bytes], object]) -> Case:
    """Weights whose file is gone, and whatever `change` puts in its place."""

    def case(b: Bench) -> Args:
        folder = b.copy("weights")
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        change(folder, whole)
        return ["--weights", folder, "--tokenizer", b.good / "tokenizer"]

    return case


def header(whole: bytes, old: str, new: str) -> bytes:
    n = 8 + int.from_bytes(whole[:8], "little")
    made = whole[8:n].decode().replace(old, new, 1).encode()
    return len(made).to_bytes(8, "little") + made + whole[n:]


def index(value: Any) -> Case:
    return files(lambda folder, whole: (folder / INDEX).write_text(json.dumps(value)))


def data(name: str, content: str | bytes, *more: str) -> Case:
    return lambda b: ["--data", b.file(name, content), *more]


def parquet(columns: dict[str, Any], cut: int | None = None) -> Case:
    def case(b: Bench) -> Args:
        pyarrow.parquet.write_table(pyarrow.table(columns), b.folder / "x.parquet")
        return ["--data", b.file("x.parquet", (b.folder / "x.parquet").read_bytes()[:cut])]

    return case


def indexed(change: Callable[[bytearray, bytearray], object]) -> Case:
    """Two documents of 50 tokens; `change` damages the bytes of .idx and .bin. Header 34, lengths from 34, pointers from 42, documents from 58."""

    def case(b: Bench) -> Args:
        with lf.data.Writer(b.folder / "x", 300, 0) as writer:
            writer.add(np.arange(100), np.array([50, 50], np.int32))
            writer.finish()
        (b.folder / "x.json").unlink()
        idx, tokens = (bytearray((b.folder / f"x{suffix}").read_bytes()) for suffix in (".idx", ".bin"))
        change(idx, tokens)
        b.file("x.idx", bytes(idx))
        b.file("x.bin", bytes(tokens))
        return ["--data", b.folder / "x"]

    return case


def about(b: Bench) -> Args:
    args = indexed(lambda *_: None)(b)
    b.file("x.json", "{")
    return args


def beside(b: Bench) -> Args:
    _, ids = indexed(lambda *_: None)(b)
    return ["--data", f"0.5:{ids}", f"0.5:{b.good / 'texts'}"]


def of_another(b: Bench) -> Args:
    args = indexed(lambda *_: None)(b)
    said = {"format": 2, "fingerprint": "x", "documents": 2, "tokens": 100, "vocab_size": 300, "eos": 0, "tokenizer": "another"}
    b.file("x.json", json.dumps(said))
    return [*args, "--tokenizer", b.good / "tokenizer"]


def eval_of_texts(b: Bench) -> Args:
    return [*indexed(lambda *_: None)(b), "--eval", f"a={b.good / 'texts'}"]


def put(form: str, at: int, value: Any) -> Case:
    return indexed(lambda idx, _: struct.pack_into(form, idx, at, value))


def blend(*words: str) -> Case:
    return lambda b: ["--data", *(word + str(b.good / "texts") for word in words)]


def flags(*words: Any) -> Case:
    return lambda b: [str(word).replace("GOOD", str(b.good)) for word in words]


def settings(text: str) -> Case:
    return lambda b: ["--config", b.file("settings.json", text)]


def tokenizer(name: str, text: str) -> Case:
    def case(b: Bench) -> Args:
        (b.copy("tokenizer") / name).write_text(text)
        return ["--tokenizer", b.folder / "tokenizer"]

    return case


def no_eos(b: Bench) -> Args:
    args = tokenizer("tokenizer_config.json", "{}")(b)
    (b.folder / "tokenizer" / "special_tokens_map.json").unlink()
    return args


def swap(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    tensors[name] = value.contiguous()


TABLE: dict[str, dict[str, tuple[Case, str]]] = {
    "config": {
        "unknown type": (config(model_type="qwen33"), "unknown model_type 'qwen33'; did you mean 'qwen3'"),
        "no type": (config(model_type=GONE), "names no model_type; known: llama"),
        "type of unicode": (config(model_type="qwén3\ud800"), r"unknown model_type 'qwén3\\ud800'; did you mean 'qwen3'"),
        "missing fields": (config(hidden_size=GONE, vocab_size=GONE), "vocab_size is missing; hidden_size is missing"),
        "text for a number": (config(hidden_size="16"), "hidden_size='16' should be a whole number above 0"),
        "fraction": (config(hidden_size=16.0), "hidden_size=16.0 should be a whole number"),
        "bool for a number": (config(num_hidden_layers=True), "num_hidden_layers=True should be a whole number"),
        "negative": (config(num_hidden_layers=-2), "num_hidden_layers=-2 should be a whole number above 0"),
        "huge": (config(vocab_size=10**30), "vocab_size=10{30} is more than 2147483647"),
        "too many layers": (config(num_hidden_layers=10**12), "num_hidden_layers=1000000000000 is more than 10000"),
        "too large to fit": (config(hidden_size=2**31 - 2), "out of memory before the first step: rank 0 needs"),
        "nan": (config(rms_norm_eps=NAN), "rms_norm_eps=nan should be a number above 0"),
        "infinite": (config(rope_theta=float("-inf")), "rope_theta=-inf should be a number above 0"),
        "heads": (config(num_key_value_heads=3), "heads=4 must be a multiple of kv_heads=3"),
        "odd heads": (config(head_dim=5), "head_dim=5 must be even"),
        "bool as text": (config(attention_bias="false"), "attention_bias='false' should be true or false"),
        "window as text": (config(use_sliding_window="no", sliding_window=8), "use_sliding_window='no' should be true or false"),
        "architectures": (config(architectures=3), "architectures=3 is not supported; only Qwen3ForCausalLM"),
        "layer types": (config(model_type="mistral", architectures=GONE, layer_types=[["x"]]), r"layer_types=\[\['x'\]\] .* not supported"),
        "quantised": (config(quantization_config={"bits": 4}), "quantization_config={'bits': 4} is not supported"),
        "rope kind": (config(rope_scaling={"rope_type": "ntk"}), "rope_type='ntk' is not supported; default, linear"),
        "rope list": (config(rope_scaling=[1]), r"rope_scaling=\[1\] should be an object"),
        "rope factor": (config(rope_scaling={"rope_type": "linear"}), "rotary positions of kind 'linear' need factor"),
        "rope twice": (config(rope_parameters={"rope_theta": 1e6}), "rope_theta=10000.0 and rope_parameters.rope_theta=1000000.0"),
        "duplicate keys": (config_text(json.dumps(MODEL)[:-1] + ', "hidden_size": 32}'), "cannot read .*config.json: 'hidden_size' stands twice"),
        "empty file": (config_text(""), "cannot read .*config.json: Expecting value"),
        "cut file": (config_text(json.dumps(MODEL)[:50]), "cannot read .*config.json: "),
        "a list": (config_text("[1]"), "config.json should be a JSON object, is a list"),
        "nested": (config_text("[" * 100_000), "cannot read .*config.json: it is nested too deeply"),
        "no text": (lambda b: ["--model", b.file("model/config.json", b"\xff\xfe{").parent], "cannot read .*config.json: 'utf-8' codec"),
        "a folder in its place": (config_folder, "cannot read .*config.json: .*[Ii]s a directory"),
        "no config": (flags("--model", "GOOD/texts"), "cannot read .*texts/config.json: .*No such file"),
        "typo of a preset": (flags("--model", "qwen3-0.6"), "unknown model 'qwen3-0.6'; did you mean 'qwen3-0.6b'"),
    },
    "weights": {
        "missing": (weights(lambda t: t.pop(UP)), rf"cannot load .*\n  {UP} \[24, 16\] is missing"),
        "extra": (weights(lambda t: swap(t, "model.layers.9.x", torch.zeros(2))), r"model.layers.9.x \[2\] is no tensor of this model"),
        "misshapen": (weights(lambda t: swap(t, UP, t[UP].T)), rf"{UP} has shape \[16, 24\], the model \[24, 16\]"),
        "quantised": (weights(lambda t: swap(t, UP, t[UP].to(torch.int8))), f"{UP} has dtype I8; F32, BF16, F16 and F64 can be loaded"),
        "too wide": (weights(lambda t: swap(t, UP, t[UP].double())), f"{UP} has dtype F64, which torch.float32 cannot hold exactly"),
        "tied": (weights(lambda t: swap(t, "lm_head.weight", t["model.embed_tokens.weight"] + 1)), "lm_head.weight differs from model.embed"),
        "cut short": (files(lambda f, whole: (f / "model.safetensors").write_bytes(whole[:-100])), "model.safetensors is cut short"),
        "empty": (files(lambda f, whole: (f / "model.safetensors").write_bytes(b"")), "model.safetensors is cut short"),
        "nan in the header": (files(lambda f, whole: (f / "model.safetensors").write_bytes(header(whole, "[0,", "[NaN,"))), "no safetensors file"),
        "pickles": (files(lambda f, whole: (f / "pytorch_model.bin").write_bytes(b"PK")), "pytorch_model.bin is a pickle, which is never opened"),
        "index to nowhere": (index({"weight_map": {UP: "model-00001-of-00001.safetensors"}}), "model-00001-of-00001.safetensors is not there"),
        "index elsewhere": (index({"weight_map": {UP: "../x.safetensors"}}), "'../x.safetensors' in it is no plain name"),
        "index of a list": (index([1]), f"{INDEX} is no JSON object with a weight_map"),
        "of another model": (lambda b: [*weights(dict)(b), *config(intermediate_size=32)(b)], "layers.0.ffn.dim=24, the layout's model 32"),
        "no folder": (flags("--weights", "GOOD/nowhere", "--tokenizer", "GOOD/tokenizer"), "cannot load .*nowhere"),
        "no tokenizer": (flags("--weights", "GOOD/weights"), "weights has no tokenizer.json; write one"),
        "dtype": (flags("--weights", "GOOD/weights", "--weights-dtype", "fp23"), "unknown --weights-dtype 'fp23'; did you mean 'fp32'"),
        "dtype of nothing": (flags("--weights-dtype", "bf16"), "--weights-dtype bf16 is of weights that are loaded; give --weights"),
    },
    "data": {
        "broken line": (data("x.jsonl", ROW * 3 + '{"text": "abc\n' + ROW), "x.jsonl, line 4: not JSON .*--on-bad skip"),
        "column": (data("x.jsonl", ROW.replace("text", "txt")), "x.jsonl, line 1: has no column 'text'; it has txt"),
        "null": (data("x.jsonl", ROW * 2 + '{"text": null}\n'), "x.jsonl, line 3: text is null, not text"),
        "no text": (data("x.jsonl", ROW + '{"text": 3}\n'), "x.jsonl, line 2: text is 3, not text"),
        "no object": (data("x.jsonl", ROW + "[1, 2]\n"), "x.jsonl, line 2: is a list, not an object"),
        "no UTF-8": (data("x.jsonl", ROW.encode() + b'{"text": "\xff"}\n'), "x.jsonl, line 2: not UTF-8 at byte 10"),
        "no UTF-8 in a text": (data("x.txt", b"abc\xff"), "x.txt: not UTF-8 at byte 3"),
        "nested": (data("x.jsonl", ROW + "[" * 100_000), "x.jsonl, line 2: not JSON"),
        "empty": (data("x.jsonl", ""), "x.jsonl: none of the 0 documents has a token"),
        "all skipped": (data("x.jsonl", '{"text": null}\n', "--on-bad", "skip"), "x.jsonl: none of .*, and 1 bad records were skipped"),
        "id": (data("x.jsonl", '{"input_ids": [1, 300]}\n'), "x.jsonl, line 1: input_ids has id 300, outside 0 … 299"),
        "id below 0": (data("x.jsonl", '{"input_ids": [1, -2]}\n'), "x.jsonl, line 1: input_ids has id -2, outside"),
        "id of a fraction": (data("x.jsonl", '{"input_ids": [1, 2.5]}\n'), "x.jsonl, line 1: input_ids has 2.5, not whole numbers"),
        "no gzip": (data("x.jsonl.gz", ROW), "x.jsonl.gz cannot be read to its end after line 0"),
        "parquet column": (parquet({"body": ["a"]}), "x.parquet has no column 'text'; it has body"),
        "parquet numbers": (parquet({"text": [1]}), "x.parquet: column text is int64, not text"),
        "parquet null": (parquet({"text": ["a", None]}), "x.parquet, row 2: text is null"),
        "parquet cut": (parquet({"text": ["a"] * 50}, cut=60), "x.parquet cannot be read as Parquet"),
        "idx magic": (put("4s", 0, b"ABCD"), "x.idx begins with b'ABCD.*no index of Megatron-LM"),
        "idx version": (put("<Q", 9, 7), "x.idx has version 7; lf reads version 1"),
        "idx type": (put("<B", 17, 6), "x.idx has tokens of type 6"),
        "idx count": (put("<Q", 18, 3), "x.idx has 82 bytes; 3 sequences and 2 documents take 94"),
        "idx header": (indexed(lambda idx, _: idx.__delitem__(slice(20, None))), "x.idx and .*x.bin cannot be read"),
        "idx lengths": (put("<i", 34, -3), "x.idx has sequence 0 of -3 tokens"),
        "idx pointers": (put("<q", 42 + 8, 50), "x.bin has 200 bytes, its index says 0 to 150"),
        "idx documents": (put("<q", 58 + 8, -1), "x.idx has document 0 from sequence 0 to -1, backwards"),
        "bin too short": (indexed(lambda _, tokens: tokens.__delitem__(slice(-2, None))), "x.bin has 198 bytes, its index says 0 to 200"),
        "ids of another vocabulary": (indexed(lambda _, tokens: struct.pack_into("<H", tokens, 60, 65535)), "x has id 65535, outside 0 … 299"),
        "about": (about, "x.json does not describe indexed documents"),
        "texts beside ids": (beside, "texts is text, and no tokenizer was given: .* give theirs with --tokenizer"),
        "ids of another tokenizer": (of_another, "x was made with another tokenizer than .*tokenizer: give the one that made it"),
        "weight below 0": (blend("-1:", "1:"), "-1:.*texts: the weight -1 must be a positive number"),
        "weight of 0": (blend("0:", "1:"), "the weight 0 must be a positive number; leave a source out"),
        "weight nan": (blend("nan:", "1:"), "the weight nan must be a positive number"),
        "weight of too little": (blend("1e-9:", "1:"), "no 1048576 rows agree with all weights .* the smallest, 1e-09"),
        "weights for some": (blend("0.5:", ""), "texts without a weight, while others have one; write 0.3:"),
        "no such path": (flags("--data", "GOOD/nothing-like-it"), "nothing-like-it does not exist"),
        "typo": (flags("--data", "GOOD/textz"), "textz does not exist; did you mean .*/texts?"),
        "no word": (flags("--data", ""), "a path of the data is empty"),
        "glob": (flags("--data", "GOOD/*.nope"), r"glob .*\*.nope matches no file"),
        "nothing matches": (flags("--match", "*.md"), r"texts has no file that matches '\*.md'"),
        "one document": (flags("--data", "GOOD/texts/0.txt", "--validation", "0.5"), "has 1 document: training and validation need"),
    },
    "flags": {
        "unknown": (flags("--nonsense", "1"), "Unrecognized options.*--nonsense"),
        "near": (flags("--seq-length", "9"), "Unrecognized options.*--seq-length.*Perhaps you meant.*--seq-len"),
        "no number": (flags("--steps", "ten"), "Error parsing --steps.*ten"),
        "no value": (flags("--steps"), "Missing value for argument '--steps'"),
        "mesh axis": (flags("--mesh", "xp=2"), "unknown axis 'xp'; the axes are pp, dp"),
        "mesh size": (flags("--mesh", "tp=0"), "mesh axis tp=0 must be at least 1"),
        "mesh word": (flags("--mesh", "tp"), "'tp' should read tp=N"),
        "mesh of another world": (flags("--mesh", "dp=2"), r"pp\*dp\*cp\*tp = 1\*2\*1\*1 = 2 ranks; the world has 1"),
        "batch": (flags("--micro-batch", "3", "--global-batch", "4"), r"micro_batch\*dp = 3\*1 = 3; the nearest that work: 3 or 6"),
        "ramp": (flags("--batch-ramp", "2:2"), "batch_ramp '2:2' should read start:increment:rows"),
        "ramp from 0": (flags("--batch-ramp", "0:1:4"), "start=0 must lie between 1 and global_batch=2"),
        "rate": (flags("--lr-schedule", "cosin"), "unknown lr_schedule 'cosin'; did you mean 'cosine'"),
        "decay": (flags("--lr-schedule", "wsd", "--decay", "nan"), "decay=nan must be a share of the steps"),
        "warmup": (flags("--warmup", "5"), "warmup=5 must lie between 0 and steps=2"),
        "steps and tokens": (flags("--tokens", "100"), "--steps 2 and --tokens 100 both say how long"),
        "lr": (flags("--lr", "nan"), "lr=nan must not be negative"),
        "clip": (flags("--clip", "nan"), "clip=nan must be above 0"),
        "weight decay": (flags("--weight-decay", "nan"), "weight_decay=nan must not be negative"),
        "log": (flags("--log", "wanddb"), "unknown log 'wanddb'; did you mean 'wandb'"),
        "on-nonfinite": (flags("--on-nonfinite", "skpi:3"), "on_nonfinite='skpi:3' should read stop, or skip:N"),
        "on-bad": (flags("--on-bad", "ignore"), "on_bad='ignore': there is stop and skip"),
        "eod": (flags("--eod", "apend"), "eod='apend': there is auto, append, keep"),
        "eval without a name": (flags("--eval", "GOOD/texts"), "--eval '.*texts' should read NAME=path"),
        "eval twice": (flags("--eval", "a=GOOD/texts", "a=GOOD/texts"), "--eval: the name 'a' stands twice"),
        "eval under a taken name": (flags("--eval", "validation=GOOD/texts", "--validation", "0.3"), "the name 'validation' is that of another"),
        "eval from nowhere": (flags("--eval", "a=GOOD/nothing-like-it"), "nothing-like-it does not exist"),
        "eval with a weight": (flags("--eval", "a=0.5:GOOD/texts"), "a=0.5:.*texts: a set has no weight"),
        "eval of texts beside ids": (eval_of_texts, "texts is text, and no tokenizer was given: .* give theirs with --tokenizer"),
        "validation of none": (flags("--validation", "0"), "--validation 0.0: must lie between 0 and 1"),
        "validation of all": (flags("--validation", "1"), "--validation 1.0: must lie between 0 and 1"),
        "validation of more": (flags("--validation", "2"), "--validation 2.0: must lie between 0 and 1"),
        "export dtype": (flags("--export-dtype", "int8"), "unknown --export-dtype 'int8'. Known: bf16"),
        "precision": (flags("--precision", "bf61"), "unknown precision 'bf61'; did you mean 'bf16'"),
        "seq-len": (flags("--seq-len", "0"), "--seq-len 0: must be at least 1"),
        "save-every": (flags("--save-every", "0"), "save_every=0: must be at least 1"),
        "keep": (flags("--keep", "0"), "keep=0: must be at least 1"),
        "device": (flags("--device", "gpu"), "unknown device 'gpu'; did you mean 'cpu'"),
        "device not built": (flags("--device", "kunlun"), "device 'kunlun' is not built yet; use --device cpu"),
        "out is a file": (lambda b: ["--out", b.file("out")], "cannot write into .*out .File exists"),
        "out cannot be": (flags("--out", "/proc/out"), "cannot write into /proc/out"),
        "out has no name": (flags("--out", ""), "'' is no name of a folder; give another --out"),
        "settings broken": (settings("{"), "cannot read config .*settings.json: "),
        "settings twice": (settings('{"lr": 1, "lr": 2}'), "cannot read config .*settings.json: 'lr' stands twice"),
        "settings unknown": (settings('{"seq_length": 1}'), "unknown field in .*settings.json: 'seq_length'; did you mean 'seq_len'"),
        "settings of other kinds": (settings('{"data": ["x"], "joined": "no", "seq_len": 5.5}'), "5.5 is no whole number .*'no' is no true or"),
        "settings of one word": (settings('{"data": "texts"}'), r"'texts' is no list @ \$.data"),
        "settings missing": (flags("--config", "GOOD/nowhere.json"), "cannot read config .*nowhere.json: .*No such file"),
        "tokenizer missing": (flags("--tokenizer", "GOOD/nowhere"), "tokenizer folder .*nowhere does not exist"),
        "tokenizer broken": (tokenizer("tokenizer.json", "{}"), "tokenizer.json is not a tokenizer that tokenizers can read"),
        "tokenizer without an end": (no_eos, "tokenizer names no end-of-document token"),
        "tokenizer with another end": (tokenizer("tokenizer_config.json", '{"eos_token": "<no>"}'), "eos_token is '<no>', which is not in"),
        "vocabulary": (lambda b: ["--tokenizer", b.good / "tokenizer", *config(vocab_size=100)(b)], "ids up to 286, the model's vocabulary is 100"),
        "bpe": (flags("--bpe-vocab", "301"), "bpe_vocab=301 must lie between 257, .* vocabulary of 300"),
    },
}  # fmt: skip


CASES = [pytest.param(*case, id=f"{kind}: {name}") for kind, cases in TABLE.items() for name, case in cases.items()]


def _argv(b: Bench, out: Path, changed: Args) -> list[str]:
    """The command line of a run that works, with what is changed in place of what was there."""
    texts, model = b.good / "texts", b.good / "model"
    plain = {"--data": texts, "--model": model, "--device": "cpu", "--steps": 2, "--warmup": 0, "--seq-len": 15, "--global-batch": 2, "--out": out}
    kept = [word for flag, value in plain.items() if flag not in changed for word in (flag, value)]
    return [str(word) for word in (*kept, *changed)]


def _trained(*_: Any) -> None:
    pytest.fail("a step was made")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    (folder / "texts").mkdir()
    for i in range(4):
        (folder / "texts" / f"{i}.txt").write_text("def return self import yield lambda x y " * 8)
    lf.data.train_bpe([p.read_text() for p in (folder / "texts").iterdir()], 290, folder / "tokenizer", exact=False)
    ctx = lf.Context(lf.solo(), lf.devices.get("cpu"), "fp32")
    layout = lf.layout(lf.hf.model(folder / "model"), ctx.axes.mesh)
    lf.hf.save(folder / "weights", layout, lf.init(layout, ctx, 0), ctx)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lf.pictures, "loss_curve", lambda *_: None)
        patch.setattr(sys, "argv", ["pretrain.py", *_argv(Bench(folder, folder), folder / "run", [])])
        lf.cli.run(pretrain.main, pretrain.Config)
    gc.collect()  # the run's lock
    return folder


@pytest.fixture
def bench(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    make = lf.train.make
    monkeypatch.setattr(lf.train, "make", lambda *args: (make(*args)[0], _trained))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Bench(good, tmp_path)


def _refused(argv: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one message with which this command ends."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        lf.cli.run(pretrain.main, pretrain.Config)
    said = capsys.readouterr()
    if isinstance(end.value.code, str):
        assert end.value.code.startswith("error: ")
        return end.value.code
    assert end.value.code == 2  # tyro's, which draws a frame
    assert "Traceback" not in said.err
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.err).split())


def _held(folder: Path) -> dict[str, bytes]:
    """Everything in the folder of a run but its lock, what was made of the data, and the settings."""
    skipped = (".lock", "config.json", "tokens", "tokenizer")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in skipped}


@pytest.mark.parametrize(("case", "words"), CASES)
def test_one_error_and_nothing_is_done(
    case: Case, words: str, bench: Bench, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, out = case(bench), bench.folder / "run"
    said = _refused(_argv(bench, out, changed), capsys, monkeypatch)
    assert re.search(words, said), said
    assert _held(out) == {} if out.exists() else True
    assert not [p for p in bench.folder.rglob("*") if ".part" in p.name or p.suffix == ".tmp"]

    shutil.copytree(bench.good / "run", bench.folder / "trained")
    before = _held(bench.folder / "trained")
    assert {"metrics.jsonl", "checkpoints/step-00000002/manifest.json", "hf/config.json"} < before.keys()
    if "--out" not in changed:
        _refused(_argv(bench, bench.folder / "trained", changed), capsys, monkeypatch)
    assert _held(bench.folder / "trained") == before


def locked(run: Path) -> Any:
    lock = open(run / ".lock", "a+")  # noqa: SIM115 — held by the test
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def torn(run: Path) -> None:
    """In the middle: nobody was killed there."""
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 1, "lo\n' + metrics.read_text().splitlines(keepends=True)[1])


def of_another_model(run: Path) -> None:
    """The checkpoint is, and the settings do not tell."""
    manifest = run / "checkpoints" / "step-00000002" / "manifest.json"
    about = json.loads(manifest.read_text())
    about["config"]["dim"] = 32
    manifest.write_text(json.dumps(about))


NEWEST = Path("checkpoints", "step-00000002")


@pytest.mark.parametrize(
    ("damage", "changed", "words"),
    [
        (locked, [], "is in use by process .*; wait for it, or give another --out"),
        (None, ["--lr", "0.5"], "holds a run with other settings:\n  lr: the run has 0.0003, this command 0.5"),
        (lambda run: (run / NEWEST / "rank-00000.safetensors").write_bytes(b"x"), [], "cannot go on from .*: rank-00000.safetensors has 1 bytes"),
        (lambda run: (run / NEWEST / "manifest.json").write_text("{"), [], "cannot go on from .*is no manifest of a checkpoint"),
        (lambda run: (run / NEWEST / "rank-00000.safetensors").unlink(), [], "cannot go on from .*: No such file"),
        (torn, [], "metrics.jsonl, line 1 is no record of a step; mend it, or remove it"),
        (of_another_model, [], "the model differs: config.dim was 32, is 16"),
        (lambda run: (run / "config.json").write_text("{"), [], "config.json is not JSON .*; remove .* or give another --out"),
        (lambda run: (run / "config.json").write_text('{"lr": 1}'), [], "holds a run with other settings"),
    ],
)
def test_a_run_folder_that_cannot_be_gone_on_with(
    damage: Any, changed: Args, words: str, bench: Bench, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.copy("run")
    held = damage and damage(run)
    before = _held(run)
    said = _refused(_argv(bench, run, changed), capsys, monkeypatch)
    assert re.search(words, said), said
    assert _held(run) == before
    del held


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be used here")
def test_cuda_without_a_card(bench: Bench, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "device 'cuda' cannot be used here" in _refused(_argv(bench, bench.folder / "run", ["--device", "cuda"]), capsys, monkeypatch)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["pretrian", "--data", "x"], "there is no script 'pretrian'; did you mean pretrain\\?"),
        (["--nproc", "0", "pretrain"], "--nproc 0: give a number of ranks, 1 or more"),
        (["--dry", "pretrain"], "--dry is no option of"),
        (["--nproc", "3", "pretrain", "--mesh", "tp=2"], "needs a multiple of .* = 2 ranks; the world has 3"),
        (["pretrain", "--mesh", "tp=2,,xp=3"], "unknown axis 'xp'"),
        (["pretrain", "--config", "nowhere.json"], "--config nowhere.json: .*No such file"),
    ],
)
def test_the_launcher_refuses_before_it_starts_a_rank(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch.main(args) == 2
    said = capsys.readouterr().err
    assert re.match(f"lf: .*{words}", said), said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def _said(axes: Any, argv: list[str]) -> str:
    sys.argv = ["pretrain.py", *argv]  # in this process alone
    try:
        lf.cli.run(pretrain.main, pretrain.Config)
    except SystemExit as end:
        return str(end.code)
    return "nothing"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (flags("--data", "GOOD/textz"), "textz does not exist; did you mean"),
        (data("x.jsonl", ROW + "[1, 2]\n"), "x.jsonl, line 2: is a list"),
        (files(lambda folder, whole: None), "there is no model.safetensors"),
        (flags("--lr", "0.5", "--out", "GOOD/run"), "holds a run with other settings"),
        (flags("--micro-batch", "3"), "must be a multiple of"),
    ],
)
def test_every_rank_says_it(case: Case, words: str, bench: Bench) -> None:
    argv = _argv(bench, bench.folder / "run", case(bench))
    for rank, said in enumerate(processes(2, _said, argv, timeout_s=60)):
        assert re.search(words, said), (rank, said)


@pytest.mark.slow
def test_a_launched_run_says_it_once(good: Path, tmp_path: Path) -> None:
    args = _argv(Bench(good, tmp_path), tmp_path / "run", ["--data", good / "textz", "--mesh", "dp=2"])
    env = {**os.environ, "LF_PYTHON": sys.executable}
    ended = subprocess.run(["scripts/launch", "pretrain", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.count("textz does not exist; did you mean") == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    assert _held(tmp_path / "run").keys() <= {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run" / "logs").rglob("*")}
