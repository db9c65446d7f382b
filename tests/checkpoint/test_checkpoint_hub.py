"""Repositories on the hub: fetched once on each node, opened from the cache, refused in one sentence. The hub is a small server on this machine.

huggingface_hub reads its environment when it is imported, so what uses it runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import attrs
import pytest
import torch
from helpers import context, processes

import lf
from lf import tree
from lf.axes_sim import SimAxes
from lf.checkpoint import hub, sources
from lf.checkpoint.hub import Repo
from lf.config import ConfigError
from lf.models.small import tiny

SHA = "0123456789" * 4
NOT_FETCHED = ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "old/model.safetensors")


class Hub(ThreadingHTTPServer):
    """Answers what huggingface_hub asks about repositories without LFS. `asked`: (method, path) of every request."""

    repos: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str]]
    down: bool = False

    def counted(self, run: Callable[..., Any], *args: Any) -> tuple[Any, Counter[tuple[str, str]]]:
        self.asked.clear()
        return run(*args), Counter(self.asked)


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        api = path.startswith("/api/models/")
        org, name, kind, revision, *file = (path.removeprefix("/api/models") if api else path).strip("/").split("/")
        self.server.asked.append((self.command, f"{kind} {'/'.join(file) or revision}"))
        repo, files = f"{org}/{name}", self.server.repos.get(f"{org}/{name}")
        if repo == "org/silent" or self.server.down:
            self.close_connection = True
        elif repo == "org/broken":
            self.say(500, b"", body)
        elif files is None:
            self.say(404, b"", body, **{"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", SHA):
            self.say(404, b"", body, **{"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            said = {"_id": "0", "id": repo, "sha": SHA, "siblings": [{"rfilename": f} for f in files]}
            self.say(200, json.dumps(said).encode(), body)
        elif kind == "tree":
            self.say(200, json.dumps([{"type": "file", "path": f, "size": len(x), "oid": digest(x)} for f, x in files.items()]).encode(), body)
        elif repo == "org/gated":
            self.say(403, b"", body, **{"X-Error-Code": "GatedRepo"})
        else:
            content = files["/".join(file)]
            self.say(200, content, body, ETag=f'"{digest(content)}"', **{"X-Repo-Commit": SHA})

    def say(self, code: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


MODEL = tiny()


def master(axes: Any) -> tuple[Any, Any, Any]:
    ctx, layout = context(axes, "fp32"), lf.layout(MODEL, axes.mesh)
    return ctx, layout, lf.init(layout, ctx, 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("export")

    def rank(axes: Any) -> None:
        ctx, layout, params = master(axes)
        lf.hf.save(folder, layout, params, ctx, max_shard_bytes=3000)

    lf.sim.spmd(lf.Mesh(), rank)
    made = {p.name: p.read_bytes() for p in folder.iterdir()}
    config, index = {"config.json": made["config.json"]}, lf.checkpoint.export.INDEX
    beside = dict.fromkeys(("tokenizer.json", *NOT_FETCHED), b"{}")
    shards = sorted(name for name in made if name.endswith(".safetensors"))
    with Hub(("127.0.0.1", 0), Answers) as out:
        out.daemon_threads, out.asked = True, []
        out.repos = {
            "org/tiny": {**made, **beside},
            "org/shape": {**made, **beside},
            "org/gated": made,
            "org/pickle": {**config, "pytorch_model.bin": b"x"},
            "org/noconfig": {"model.safetensors": b"x"},
            "org/twice": {**made, "model.safetensors": b"x"},
            "org/lost": {name: x for name, x in made.items() if name != shards[1]},
            "org/index": {**made, index: b"[]"},
        }
        Thread(target=out.serve_forever, daemon=True).start()
        yield out
        out.shutdown()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("hub")


def worker(server: Hub, cache: Path, **env: str) -> ProcessPoolExecutor:
    """A fresh process that knows the hub by its environment alone."""
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in env.items():
            patch.setenv(name, value)
        pool.submit(os.getpid).result()
    return pool


@pytest.fixture(scope="module")
def online(server: Hub, cache: Path) -> Iterator[Any]:
    with worker(server, cache) as pool:
        yield lambda fn, *args: pool.submit(fn, *args).result()


@pytest.fixture(scope="module")
def offline(server: Hub, cache: Path) -> Iterator[Any]:
    with worker(server, cache, HF_HUB_OFFLINE="1") as pool:
        yield lambda fn, *args: pool.submit(fn, *args).result()


def loaded(axes: Any, source: str) -> bool:
    """Whether the model and its parameters are those of the server."""
    ctx, layout, params = master(axes)
    assert attrs.evolve(lf.hf.model(source, axes).config, family="") == MODEL.config
    return all(torch.equal(a, b) for a, b in zip(tree.leaves(lf.hf.load(source, layout, ctx)), tree.leaves(params)))


def on_four(source: str) -> list[bool]:
    return processes(lf.Mesh(dp=2, tp=2), loaded, source)


def on_one(source: str) -> bool:
    return loaded(lf.solo(), source)


def shape_of(source: str) -> bool:
    return attrs.evolve(lf.hf.model(source).config, family="") == MODEL.config


def folder_of(source: str, weights: bool = True) -> str:
    return str(lf.hf.folder(source, weights=weights))


def test_four_ranks_fetch_each_file_once_and_then_ask_for_the_revision_alone(server: Hub, online: Any) -> None:
    right, asked = server.counted(online, on_four, "org/tiny")
    assert right == [True] * 4
    fetched = {what.partition(" ")[2]: n for (method, what), n in asked.items() if method == "GET" and what.startswith("resolve")}
    assert fetched == {name: 1 for name in server.repos["org/tiny"] if name not in NOT_FETCHED}
    right, asked = server.counted(online, on_four, "org/tiny")
    assert right == [True] * 4
    assert asked == {("GET", "revision main"): 2}  # of the model and of its weights
    right, asked = server.counted(online, on_one, f"org/tiny@{SHA}")
    assert right
    assert not asked


def test_a_shape_needs_no_weights_and_a_tokenizer_none_either(server: Hub, online: Any) -> None:
    right, asked = server.counted(online, shape_of, "org/shape@v1")
    assert right
    assert {what for method, what in asked if method == "GET" and what.startswith("resolve")} == {"resolve config.json"}
    where, asked = server.counted(online, folder_of, "org/shape@v1", False)
    assert sorted(os.listdir(where)) == ["config.json", "tokenizer.json"]
    assert asked["GET", "resolve tokenizer.json"] == 1


WRONG = {
    "org/absent": "has no model org/absent (or not without the right HF_TOKEN), and there is no such folder either",
    "org/gated": "org/gated@main is gated: accept its terms on http",
    "org/tiny@v7": "org/tiny has no revision 'v7'; give a branch",
    "org/pickle": "org/pickle@main has no safetensors (pytorch_model.bin is a pickle, which is never opened); choose a revision that has",
    "org/noconfig": "org/noconfig@main has no config.json",
    "org/twice@v1": "org/twice@v1 has both model.safetensors and model.safetensors.index.json",
    "org/lost": "names model-00002-of",
    "org/index": "model.safetensors.index.json is no JSON object with a weight_map",
    "org/broken": "did not give org/broken@main: ",
    "org/silent": "fetch it where there is a network, or give a folder",
    "org/a--b": "'org/a--b' is no name of a repository",
}


def refused(source: str, weights: bool = True) -> str:
    try:
        lf.hf.folder(source, weights=weights)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{source} was not refused")


@pytest.mark.parametrize("source", WRONG)
def test_what_the_hub_does_not_give_is_one_sentence(online: Any, source: str) -> None:
    words = online(refused, source)
    assert WRONG[source] in words
    assert "\n" not in words
    assert source.partition("@")[0].rpartition("/")[2] in words


def two_nodes(axes: Any, source: str) -> str:
    os.environ["LOCAL_RANK"] = str(axes.rank % 2)
    with pytest.raises(ConfigError) as caught:
        lf.hf.load(source, lf.layout(MODEL, axes.mesh), context(axes, "fp32"))
    return str(caught.value)


def on_two_nodes(source: str) -> list[str]:
    return processes(4, two_nodes, source)


def test_every_rank_of_every_node_hears_why(online: Any) -> None:
    words = online(on_two_nodes, "org/pickle")
    assert words[0] == words[1] == words[3]
    assert all("org/pickle@main has no safetensors" in said for said in words)


def test_without_a_network_what_is_in_the_cache_is_taken_and_nothing_else(server: Hub, online: Any, offline: Any) -> None:
    online(folder_of, "org/tiny")
    online(shape_of, "org/shape")
    server.asked.clear()
    assert offline(on_one, "org/tiny")
    assert offline(shape_of, "org/shape")
    for source, words in {
        "org/shape": "model.safetensors of org/shape@main is not in ",
        "org/twice": "HF_HUB_OFFLINE is set, and org/twice@main is not in ",
        "org/tiny@v2": "org/tiny@v2 is not in ",
    }.items():
        said = offline(refused, source)
        assert words in said
        assert "unset it once where there is a network, or give a folder" in said
    assert not server.asked


def test_a_hub_that_is_away_is_not_replaced_by_the_cache_in_silence(server: Hub, online: Any, monkeypatch: Any) -> None:
    online(folder_of, "org/tiny")
    monkeypatch.setattr(server, "down", True)
    assert "for org/tiny@main from " in online(refused, "org/tiny")
    assert "set HF_HUB_OFFLINE=1 to take what is in the cache" in online(refused, "org/tiny")
    assert online(on_one, f"org/tiny@{SHA}")  # a commit cannot have changed


def full_disk() -> str:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", full)
        return refused("org/shape@v1")


def test_a_full_disk_is_no_matter_of_the_network(online: Any) -> None:
    words = online(full_disk)
    assert words.startswith("cannot write org/shape@v1 into ")
    assert "No space left on device); make room, or set HF_HOME" in words


# What a name means, and who fetches: without huggingface_hub.


def test_a_name_means_a_preset_a_folder_or_a_repository(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path("~/x").expanduser()
    for source, meant in {
        "qwen3-demo": "qwen3-demo",
        "preset:qwen3-demo": "qwen3-demo",
        "Qwen/Qwen3-0.6B": Repo("Qwen/Qwen3-0.6B"),
        "Qwen/Qwen3-0.6B@refs/pr/1": Repo("Qwen/Qwen3-0.6B", "refs/pr/1"),
        "./org/name": Path("org/name"),
        "org/name/": Path("org/name"),
        "a/b/c": Path("a/b/c"),
        "/a/b": Path("/a/b"),
        "~/x": home,
        "../a": Path("../a"),
        "elsewhere": Path("elsewhere"),
    }.items():
        assert sources.meaning(source) == meant, source
    assert sources.meaning(Path("org/name")) == Path("org/name")
    for folder in ("qwen3-demo", "org/name", "org/name@main"):
        Path(folder).mkdir(parents=True)
    for source, (one, other) in {
        "qwen3-demo": ("preset:qwen3-demo for the preset", "./qwen3-demo for the folder"),
        "org/name": ("./org/name for the folder", "org/name@main for the repository"),
        "org/name@main": ("./org/name@main for the folder", "a commit after the @ for the repository"),
    }.items():
        with pytest.raises(ConfigError, match=r"here[,;] ") as caught:
            lf.hf.model(source)
        assert one in str(caught.value)
        assert other in str(caught.value)
    for source in ("./qwen3-demo", "preset:qwen3-demo", "./org/name", "org/name@v1", Path("org/name")):
        sources.meaning(source)
    with pytest.raises(ConfigError, match="unknown preset 'qwen3-deme'; did you mean 'qwen3-demo'"):
        lf.hf.model("preset:qwen3-deme")
    with pytest.raises(ConfigError, match="is a preset: a shape, without weights or tokenizer"):
        lf.hf.folder("qwen3-1.7b")


def test_nodes_that_got_different_commits_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(SimAxes, "first_of_node", property(lambda axes: axes.rank in (0, 2)))

    def rank(axes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            lf.hf.folder("org/name", axes)
        return str(caught.value)

    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr(hub, "_fetch", lambda *args: next(commits))
    one, other = "a" * 40, "b" * 40
    said = set(lf.sim.spmd(lf.Mesh(dp=4), rank))
    assert said == {f"org/name@main is {one} on one node and {other} on another; name the commit that all should have: org/name@{one}"}
