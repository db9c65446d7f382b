"""What one rank's tensors take up, and the operations of its matrix products: measured where they are made, to the byte.

    with Meter({"parameter": state.params, "optimizer": state.optimizer, "batch": batches}) as meter:
        state, metrics = step(state, batches)
    meter.peak, meter.peak_by_kind, meter.flops

Memory is that of storages: one counts once, however many tensors look at it, from the operation that makes it until nobody holds it, be that
autograd. One that is resized counts with what it has then. What an allocator adds (rounding, what it keeps for later) and what a kernel takes up
while it runs is not seen. Tensors without data (device "meta") count as those with data do.

Each storage is of a kind, a word. Whoever knows says so, with `mark`; what nobody has said anything about is "activation": what a forward keeps, and
whatever is there for a moment. The first word stands: parameters that are the master themselves are not optimizer state as well.

Operations are those of torch.utils.flop_counter, two for each multiplication and addition of a product, and the same of those that it does not know.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

import lf.parallel.product  # noqa: F401  it defines the operator that is counted below

KINDS = PARAMETER, GRADIENT, OPTIMIZER, BATCH, BUFFER, ACTIVATION = "parameter", "gradient", "optimizer", "batch", "buffer", "activation"
"""Kinds that lf uses. "buffer": parameters that are whole only while they are used."""
HOST = "host"
"""What lies in the host's memory although it looks as if it were on the device, as tensors on paper do: it does not count."""


@attrs.define
class _Stored:
    """A storage that lives. `since`: the moment of its last change of size."""

    bytes: int
    kind: str
    since: int
    ref: Any


class Meter(TorchDispatchMode):
    """Counts while it is on (`with`). known: trees of tensors that are there already, by kind. device: the type of device that counts ("cuda": what
    lies on the host does not); None: every one. read: what gives the documents of packed attention, of a card's kernel, to the host.

    peak: bytes at most so far · peak_by_kind: what they were then · now, now_by_kind: bytes that live, also after it has been on · flops: operations
    of matrix products, also of attention and grouped ones.
    It is of one thread (and of those that its backwards run in): simulated ranks have one each. It holds no tensor and changes none.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch loads its compiler at the first operation, which takes seconds."""
        return False

    def __init__(
        self, known: Mapping[str, Any] | None = None, device: str | None = None, read: Callable[[Tensor], list[int]] = Tensor.tolist
    ):
        super().__init__()
        self.device, self.flops, self.peak, self.now = device, 0, 0, 0
        self.now_by_kind, self.peak_by_kind = dict[str, int](), dict[str, int]()
        self._stored = dict[int, _Stored]()
        self._moment = self._peak_moment = 0
        self._counts, self._of = True, _formulas(read)
        for kind, trees in (known or {}).items():
            self.mark(kind, trees)

    def mark(self, kind: str, *trees: Any) -> None:
        """The storages of these tensors are of this kind, unless another has been said; those that it has not seen count from here on."""
        for x in tree_leaves(trees):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            known = self._stored.get(storage._cdata)
            if known is None:
                self._take(storage, kind)
            elif known.kind == ACTIVATION and kind == HOST:
                self._change(ACTIVATION, -known.bytes)
                known.kind = HOST
            elif known.kind == ACTIVATION:
                tables = [self.now_by_kind, *([self.peak_by_kind] if known.since <= self._peak_moment else [])]
                for table in tables:
                    _add(table, ACTIVATION, -known.bytes)
                    _add(table, kind, known.bytes)
                known.kind = kind

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """What is made in here does not count, nor what it computes."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._counts:
            return out
        if (formula := self._of.get(func.overloadpacket)) is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        given: set[int] | None = None
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if (known := self._stored.get(key)) is not None:
                if storage.nbytes() != known.bytes:  # by an operation, as one that writes into `out`
                    self._resized(key, storage.nbytes())
                continue
            if given is None:  # what somebody gives, who has not said that it is there, is not made here
                given = set() if func in FRESH else {y.untyped_storage()._cdata for y in tree_leaves((args, kwargs)) if _strided(y)}
            if key not in given:
                self._take(storage, ACTIVATION)
        return out

    def _take(self, storage: torch.UntypedStorage, kind: str) -> None:
        if self.device not in (None, storage.device.type):
            return
        key, bytes = storage._cdata, storage.nbytes()
        self._moment += 1
        self._stored[key] = _Stored(bytes, kind, self._moment, weakref.ref(storage, lambda _: self._drop(key)))
        storage.resize_ = _followed(storage, lambda n: self._resized(key, n))  # type: ignore[method-assign, assignment]
        self._change(kind, bytes)

    def _drop(self, key: int) -> None:
        gone = self._stored.pop(key)
        self._change(gone.kind, -gone.bytes)

    def _resized(self, key: int, bytes: int) -> None:
        known = self._stored[key]
        self._moment += 1
        change, known.bytes, known.since = bytes - known.bytes, bytes, self._moment
        self._change(known.kind, change)

    def _change(self, kind: str, bytes: int) -> None:
        if kind == HOST:
            return
        self.now += bytes
        _add(self.now_by_kind, kind, bytes)
        if self.now > self.peak:
            self.peak, self.peak_by_kind, self._peak_moment = self.now, dict(self.now_by_kind), self._moment


FRESH = (torch.ops.aten.lift_fresh.default,)
"""Operations that give what they are given, which Python has just made (torch.tensor)."""


@contextmanager
def quiet() -> Iterator[None]:
    """`Meter.quiet` of the meters that are on in this thread."""
    with ExitStack() as stack:
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Meter):
                stack.enter_context(mode.quiet())
        yield


def mark(kind: str, *trees: Any) -> None:
    """Tells the meters that are on in this thread what these tensors are; without one it does nothing."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Meter):
            mode.mark(kind, *trees)


def _followed(storage: torch.UntypedStorage, tell: Callable[[int], None]) -> Callable[[int], Any]:
    """`storage.resize_`, which no dispatch sees, with somebody who is told. The Python object of a storage lives as long as the storage does."""
    ref, before = weakref.ref(storage), storage.__dict__.get("resize_")  # of another meter

    def resize_(n: int) -> Any:
        here = ref()
        assert here is not None
        out = torch.UntypedStorage.resize_(here, n) if before is None else before(n)
        tell(n)
        return out

    return resize_


def _strided(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided


def _add(table: dict[str, int], kind: str, bytes: int) -> None:
    table[kind] = table.get(kind, 0) + bytes
    if not table[kind]:
        del table[kind]


def _formulas(read: Callable[[Tensor], list[int]]) -> dict[Any, Callable[..., int]]:
    """Operations by operator: torch's own table, and what it does not have."""
    from torch.utils.flop_counter import flop_registry  # here, because it loads more than a step does

    aten, out = torch.ops.aten, dict(flop_registry)
    out[aten.addmm_] = out[aten.baddbmm_] = _into
    out[aten._scaled_dot_product_flash_attention_for_cpu] = _attention
    out[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward
    out[aten._flash_attention_forward], out[aten._flash_attention_backward] = partial(_packed, read), partial(_packed_backward, read)
    out[torch.ops.lf.add_product] = _added
    if hasattr(aten, "_grouped_mm"):
        out[aten._grouped_mm] = _grouped
    return out


def _into(acc: Tensor, a: Tensor, b: Tensor, *rest: Any, **more: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _grouped(a: Tensor, b: Tensor, *rest: Any, **more: Any) -> int:
    """The rows, or the columns, of all groups together: each is multiplied in one of them."""
    return 2 * a.numel() * b.shape[-1]


def _added(acc: Tensor, rows: Tensor, dy: Tensor, **more: Any) -> int:
    return 2 * rows.numel() * dy.shape[1]


def _packed(read: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any, **more: Any) -> int:
    """(tokens, heads, dim) of packed documents."""
    return 2 * q.shape[1] * (q.shape[2] + v.shape[2]) * sum((b - a) ** 2 for a, b in itertools.pairwise(read(starts)))


def _packed_backward(read: Any, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, z: Tensor, starts: Tensor, *_: Any, **more: Any) -> int:
    return 2 * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2]) * sum((b - a) ** 2 for a, b in itertools.pairwise(read(starts)))


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> int:
    """q·kᵀ and ·v; like torch's table, all of the scores where half of them are masked."""
    return 2 * q.numel() // q.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> int:
    """The scores again, dq and dk; dv and those of the scores."""
    return 2 * q.numel() // q.shape[-1] * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])
