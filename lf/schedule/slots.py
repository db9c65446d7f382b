"""What a forward keeps for its backward, as values that the program moves.

    slots = Slots(keep, ops=("swiglu",))
    with slots.filing():
        y = …the layer's forward, with slots.table(ctx.ops) for ctx.ops
    slots.offload(device, streams)      OFFLOAD   starts the copies to the host's memory; nothing on the device is held any more
    slots.fetch(device, streams)        FETCH     starts the copies back; the first backward that needs one waits
    slots.remat()                       REMAT     runs the chosen ops again

Autograd's hooks do nothing but file: each tensor that a node of the graph keeps is given to `Slots`, and the node keeps its place there. The
graph owns the places, `Slots` only knows of them: what a node's backward has used goes at once, as it would without. Parameters and whatever
else `keep` names are handed through. So that the graph holds no other device memory, its two ends must not be the tensors themselves: `entry`
stands for what goes in, `ends` (vjp.py) for what comes out.

Ops that are run again. A chosen op keeps its inputs and nothing else, and whoever keeps its output keeps a recipe instead. What that saves, in
elements for each layer of a decoder (T tokens of the tp group, t of this rank, F feed-forward columns, D width, h heads of d dims, k kv heads):

    swiglu      T·F         its output, which the product after it keeps
    rms_norm    2·t·D       its outputs before the two products; with norms of q and k and with rope chosen, theirs too: T·(h+k)·d
    rope        T·(h+k)·d   its outputs, which attention keeps; nothing where its inputs are the outputs of norms that are not chosen
    attention   T·h·d       its output, and the log-sum-exp of each head and token

Inputs that nobody else keeps must be kept then, as those of rope may: choose the op before as well. The numbers are those of the op to the bit.
Autograd may add up the gradients of an input in another order where the op is several nodes that use it several times, as lf's kernels are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lf.config import ConfigError, one_of
from lf.schedule.vjp import ends, vjp

CHUNK = 1 << 25  # bytes of a copy: a power of two, to which torch's allocator of pinned memory rounds up
SMALL = 1 << 10  # bytes: a storage below it stays where it is


class SlotError(ValueError):
    """A value that is not where the program says: it has no FETCH or REMAT before the backward, or was changed after it was kept."""


@attrs.define(eq=False)
class _Box:
    """A storage in the host's memory, in pieces, and back on the device as `flat`, bytes, once it is fetched."""

    pieces: Sequence[Tensor]
    after: Callable[[], None]
    flat: Tensor | None = None
    wait: Callable[[], None] | None = None
    version: int = 0

    def open(self) -> Tensor:
        if self.flat is None:
            raise SlotError("a kept tensor is needed in the backward while it lies in the host's memory: no FETCH of it has run")
        if self.wait is not None:
            self.wait()
            self.wait, self.pieces = None, ()
        return self.flat


@attrs.define(eq=False)
class _Slot:
    """One tensor that a node keeps. `value` shares the tensor's storage while it is on the device, and its version counter for ever."""

    value: Tensor
    version: int
    place: tuple[Any, ...]  # shape, stride, offset in the storage
    box: _Box | None = None

    def get(self) -> Tensor:
        _unchanged(self.value, self.version)
        if self.box is None:
            return self.value
        flat = self.box.open()
        _unchanged(flat, self.box.version)
        size = self.value.element_size()
        return flat[: len(flat) // size * size].view(self.value.dtype).as_strided(*self.place)


@attrs.define(eq=False)
class _Recipe:
    """One call of a chosen op. `args`: a place for each tensor, other arguments as they are · `metas`: shape, stride, offset, dtype of each output ·
    `inputs`, `outputs`: of the op's own graph, once it has run again."""

    name: str
    op: Callable[..., Any]
    args: tuple[Any, ...]
    needs: tuple[bool, ...]
    metas: tuple[Any, ...] = ()
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Tensor, ...] = ()

    def run(self) -> None:
        args = tuple(got(a) for a in self.args)
        self.inputs = tuple(a.detach().requires_grad_() if n else a for a, n in zip(args, self.needs))
        with torch.enable_grad():
            self.outputs = _several(self.op(*self.inputs))
        if (metas := tuple(_meta(y) for y in self.outputs)) != self.metas:
            raise SlotError(f"{self.name}, run again, gave {metas}; the first time it gave {self.metas}: an op that is run again must be exact")

    def done(self) -> tuple[Tensor, ...]:
        if not self.outputs:
            raise SlotError(f"the output of {self.name} is needed in the backward and was not kept: no REMAT of it has run")
        return self.outputs


@attrs.define(eq=False)
class _Output:
    """A tensor that a node keeps, and that is (a view of) the output of an op that will run again."""

    recipe: _Recipe
    at: int
    value: Tensor
    version: int
    place: tuple[Any, ...]  # shape, stride, offset in the storage

    def get(self) -> Tensor:
        _unchanged(self.value, self.version)
        return self.recipe.done()[self.at].detach().as_strided(*self.place)


class Slots:
    """What the forward of one layer, stage or segment keeps. `keep`: the storages (`_cdata`) that are never filed: parameters, the batch's
    plan and what is derived from it · `ops`: names of ops that are run again.

    `streams`, of `offload` and `fetch`, come from `device.copy_streams()`: made once by whoever runs the program and given to every call, so
    that all copies one way follow each other, without a stream that the module would have to remember.
    """

    def __init__(self, keep: frozenset[int] | set[int] = frozenset(), ops: Sequence[str] = ()) -> None:
        self.keep, self.ops = keep, tuple(ops)
        self._slots: list[weakref.ref[_Slot]] = []
        self._recipes: list[weakref.ref[_Recipe]] = []
        self._made: dict[int, tuple[StorageWeakRef, _Recipe, int, int]] = {}  # outputs of chosen ops with their versions, by storage, in a forward
        self._filing = False

    @contextmanager
    def filing(self) -> Iterator[None]:
        """What autograd keeps in here, on this thread, is filed."""
        self._filing = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.file, got):
                yield
        finally:
            self._filing = False
            self._made.clear()  # the storages' addresses may be used again

    def table(self, ops: SimpleNamespace) -> SimpleNamespace:
        """The op table in which the chosen ops keep nothing but their inputs. Raises ConfigError for a name that is none of its ops."""
        chosen = {name: self._again(name, getattr(ops, one_of("op to run again", name, vars(ops)))) for name in self.ops}
        return SimpleNamespace(**{**vars(ops), **chosen})

    def offload(self, device: ModuleType, streams: Any, chunk: int = CHUNK) -> None:
        """Starts copying each storage that is filed, once, to the host's memory, in pieces of at most `chunk` bytes, and lets go of it here.

        Storages of less than SMALL bytes stay. Raises SlotError for a tensor that is more than a strided view of plain memory.
        """
        groups: dict[int, list[_Slot]] = {}
        for slot in self._live():
            if slot.box is None and slot.value.untyped_storage().nbytes() >= SMALL:
                _unchanged(slot.value, slot.version)
                groups.setdefault(slot.value.untyped_storage()._cdata, []).append(slot)
        for slot in (s for group in groups.values() for s in group):
            v = slot.value
            if type(v) is not Tensor or v.layout is not torch.strided or v.is_conj() or v.is_neg():
                raise SlotError(f"a {type(v).__name__} of {v.dtype}, {v.layout}, that the forward keeps cannot be offloaded: only plain tensors can")
        if not groups:
            return
        flats = [torch.empty(0, dtype=torch.uint8, device=g[0].value.device).set_(g[0].value.untyped_storage()) for g in groups.values()]
        hosts, after = device.copy_out(flats, chunk, streams)
        for group, pieces in zip(groups.values(), hosts):
            box = _Box(pieces, after)
            for slot in group:
                slot.box = box
                slot.value.data = slot.value.new_empty(0)  # the storage goes, the version counter stays shared

    def fetch(self, device: ModuleType, streams: Any) -> None:
        """Starts the copies back to the device, those that the backward needs first before the others. The first that needs one waits for it."""
        for slot in reversed(self._live()):
            if (box := slot.box) is not None and box.flat is None:
                box.flat, box.wait = device.copy_in(box.pieces, slot.value.device, box.after, streams)
                box.version = box.flat._version

    def remat(self) -> None:
        """Runs the chosen ops again, in their order, from what they were given: their outputs lie in their slots, and their backwards can run."""
        for ref in self._recipes:
            if (recipe := ref()) is not None and recipe.args and not recipe.outputs:
                recipe.run()

    def bytes(self) -> tuple[int, int]:
        """(on the device, in the host's memory): bytes of the storages that are filed."""
        storages: dict[int, int] = {}
        boxes: dict[int, _Box] = {}
        for slot in self._live():
            if slot.box is None:
                storages[slot.value.untyped_storage()._cdata] = slot.value.untyped_storage().nbytes()
            else:
                boxes[id(slot.box)] = slot.box
        back = sum(len(box.flat) for box in boxes.values() if box.flat is not None)
        return sum(storages.values()) + back, sum(len(piece) for box in boxes.values() for piece in box.pieces)

    def _live(self) -> list[_Slot]:
        return [slot for ref in self._slots if (slot := ref()) is not None]

    def file(self, x: Tensor) -> Any:
        """The place of x: without its graph, or a node that keeps its own output would keep itself."""
        storage, value, version, place = x.untyped_storage(), x.detach(), x._version, (x.shape, x.stride(), x.storage_offset())
        if made := self._made.get(storage._cdata):
            _, recipe, at, given = made
            if version == given and x.dtype == recipe.metas[at][-1]:  # changed since, it is no longer what the op gives
                value.data = value.new_empty(0)
                return _Output(recipe, at, value, version, place)
        slot = _Slot(value, version, place)
        if storage._cdata not in self.keep:
            self._slots.append(weakref.ref(slot))
        return slot

    def _again(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def again(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                raise ConfigError(f"recompute of the op {name!r} inside a compiled segment: the compiler decides itself what it runs again")
            needs = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
            if not (self._filing and torch.is_grad_enabled() and any(needs)):
                return op(*args)
            recipe = _Recipe(name, op, tuple(self.file(a) if isinstance(a, Tensor) else a for a in args), needs)
            self._recipes.append(weakref.ref(recipe))
            out = _Again.apply(recipe, *args)
            given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
            for at, y in enumerate(_several(out)):
                if (storage := y.untyped_storage())._cdata not in given:
                    self._made[storage._cdata] = (StorageWeakRef(storage), recipe, at, y._version)
            return out

        return again


class _Again(torch.autograd.Function):
    """An op that keeps its inputs, in a recipe, and whose backward is that of the op as `remat` has run it again."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *args: Any) -> Any:
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)
        out = recipe.op(*args)
        recipe.metas = tuple(_meta(y) for y in _several(out))
        return out if isinstance(out, Tensor) else tuple(out)  # a list would go past autograd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        recipe = ctx.recipe
        pairs = [(y, g) for y, g in zip(recipe.done(), grads) if g is not None and y.requires_grad]
        wanted = [x for x, n in zip(recipe.inputs, recipe.needs) if n]
        with torch.enable_grad():
            held = ends(y for y, _ in pairs)
        found = iter(vjp(held, [g for _, g in pairs], wanted))
        recipe.args, recipe.inputs, recipe.outputs = (), (), ()
        return None, *(next(found) if n else None for n in recipe.needs)


def entry(x: Tensor) -> tuple[Tensor, Tensor]:
    """(leaf, x in a graph): the gradient of `leaf`, which is as large as one element, is that of x. A leaf that is x itself would hold its memory."""
    leaf = x.new_empty(()).expand(x.shape).requires_grad_()
    return leaf, _Entry.apply(leaf, x)


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy, None


def got(place: Any) -> Any:
    """The tensor that lies in this place; what is no place is itself."""
    return place.get() if isinstance(place, (_Slot, _Output)) else place


def _several(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _meta(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.storage_offset(), x.dtype


def _unchanged(x: Tensor, version: int) -> None:
    """Autograd's own check, which it leaves to those who hook in."""
    if x._version != version:
        raise SlotError(f"a tensor that was kept for the backward has been changed in place since: it is at version {x._version}, not {version}")
