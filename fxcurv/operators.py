"""Matrix-free products as programs of their own: what they keep of the forward pass, and the objects that call them.

The pass `products` emits them: `walks/products` builds one joint graph from the captured inputs and the vectors to the
products, and cuts it in two. The main program computes the values that the cut saves, next to its other results; the
product program starts from these.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ArgumentError
from fxcurv.ir.graph import takes_strides, to_reshape
from fxcurv.ir.heap import uncollected
from fxcurv.ir.private import compile_lock, make_fx, pytree, version_of
from fxcurv.ir.program import Program
from fxcurv.ir.ranks import summed
from fxcurv.kronecker import linear_operator
from fxcurv.walks.products.partition import restrict

# ---- at a call ------------------------------


class Code:
    """The static part of a product: its GraphModules, and the names and shapes that go with their arguments.

    Attributes:
        labels: what each saved value is, for messages.
        shapes, dtypes, devices: of the parameters, by name.
        differentiable: whether products can be differentiated, with respect to parameters, inputs and vectors.
    """

    def __init__(self, program: Program, labels: list[str], names: tuple[str, ...]):
        self.labels = labels
        self.shapes = {name: tuple(program.shapes[name]) for name in names}
        vals = {name: node.meta["val"] for name, node in program.params.items()}
        self.dtypes = {name: vals[name].dtype for name in self.shapes}
        self.devices = {name: vals[name].device for name in self.shapes}
        self.differentiable = bool(program.options.create_graph)
        self._batched: dict[Any, Callable] = {}

    def __deepcopy__(self, memo: dict) -> Code:
        return self

    def __reduce__(self):
        raise ArgumentError("a product holds programs, which cannot be pickled: pickle the result's tensors")

    def block(self, name: str) -> fx.GraphModule | None:
        """The product of one parameter's diagonal block, (*kept, vector) -> (result,); None where it is zero."""
        raise NotImplementedError

    def prologue(self, name: str) -> fx.GraphModule | None:
        """What a block computes once from the saved values, (*saved) -> kept; None: it keeps the saved values."""
        return None

    def complete(self, names: Sequence[str], values: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results `names` for the samples of all ranks, from this rank's `values`."""
        return values

    def prepare(self) -> None:
        """Emit every block now: inside `torch.compile` it would be too late."""
        for name in self.shapes:
            self.block(name)
            self.prologue(name)

    def run(self, gm: fx.GraphModule, kept: list[Any], vectors: list[Tensor], batched: bool) -> tuple[Tensor, ...]:
        """Run a product program on vectors, each with one more leading axis if `batched`."""
        if torch.compiler.is_compiling():  # Dynamo knows no inference mode
            with self._grad_mode():
                return (self._over_vectors(gm, kept, vectors) if batched else gm)(*kept, *vectors)
        device = next(iter(self.devices.values()))
        with torch.inference_mode(False), self._grad_mode(), torch.autocast(device.type, enabled=False):
            return (self._over_vectors(gm, kept, vectors) if batched else gm)(*kept, *vectors)

    def _grad_mode(self):
        return torch.enable_grad() if self.differentiable else torch.no_grad()

    def _over_vectors(self, gm: fx.GraphModule, kept: list[Any], vectors: list[Tensor]):
        """`gm` mapped over the vectors' leading axis: traced once per kind of arguments."""
        mapped = torch.vmap(gm, (*[None] * len(kept), *[0] * len(vectors)))
        if torch.compiler.is_compiling():
            return mapped
        key = (gm, *(t.shape if isinstance(t, Tensor) else t for t in (*kept, *vectors)))
        if key not in self._batched:
            plain = [t.detach() if isinstance(t, Tensor) else t for t in (*kept, *vectors)]
            with compile_lock, torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an op without a batching rule is looped over
                try:
                    self._batched[key] = _traced(mapped, plain)
                except RuntimeError:  # vmap refuses a few ops (as_strided_scatter)
                    self._batched[key] = _one_by_one(gm, len(kept))
        return self._batched[key]


def _traced(mapped: Callable, given: list[Any]) -> fx.GraphModule:
    """A function of several vectors as a graph, traced on fake values, whose strides may be others than those of a call."""
    gm = make_fx(mapped, tracing_mode="fake", _allow_non_fake_inputs=True)(*given)
    if any(map(takes_strides, gm.graph.nodes)):
        return make_fx(mapped)(*given)
    for node in gm.graph.nodes:
        to_reshape(node)
    gm.recompile()
    return gm


def _one_by_one(gm: fx.GraphModule, count: int) -> Callable[..., tuple[Tensor, ...]]:
    """`gm` in a loop over the leading axis of its arguments, without the first `count` of them."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        rows = [gm(*args[:count], *vectors) for vectors in zip(*args[count:], strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))

    return run


class AllBlocks(Code):
    """One program for all parameters, whose blocks are parts of it.

    Attributes:
        whole: (*saved, a vector per name in `inputs`) -> a result per name in `outputs`.
        summed: the outputs that are sums over samples, which ranks with a part of the samples each add up.
    """

    def __init__(
        self,
        program: Program,
        labels: list[str],
        names: tuple[str, ...],
        whole: fx.GraphModule,
        inputs: list[str],
        outputs: list[str],
        summed: Sequence[str] = (),
    ):
        super().__init__(program, labels, names)
        self.whole, self.inputs, self.outputs, self.summed, self._group = (
            whole,
            inputs,
            outputs,
            summed,
            program.options.ranks,
        )
        self._blocks: dict[str, fx.GraphModule] = {}

    def complete(self, names: Sequence[str], values: Sequence[Tensor]) -> list[Tensor]:
        """The results `names` over all ranks: one collective for a product, however many vectors it has."""
        parts = [v for name, v in zip(names, values, strict=True) if name in self.summed]
        sums = iter(summed([False] * len(parts), self._group, parts) if parts else [])
        return [next(sums) if name in self.summed else v for name, v in zip(names, values, strict=True)]

    def block(self, name: str) -> fx.GraphModule | None:
        if name not in self.outputs:
            return None
        if name not in self._blocks:
            first = len(self.labels)
            vectors = list(range(first, first + len(self.inputs)))
            keep = first + self.inputs.index(name)
            self._blocks[name] = restrict(self.whole, vectors, keep, self.outputs.index(name))
        return self._blocks[name]


Parts = tuple[fx.GraphModule, fx.GraphModule]
"""What a block computes once from the saved values, and the block's product."""


class EachBlock(Code):
    """A program per parameter, emitted by `emit(name)` when it is first asked for (None where the block is zero)."""

    def __init__(
        self, program: Program, labels: list[str], names: tuple[str, ...], emit: Callable[[str], Parts | None]
    ):
        super().__init__(program, labels, names)
        self._emit = emit
        self._parts: dict[str, Parts | None] = {}

    def block(self, name: str) -> fx.GraphModule | None:
        parts = self._emitted(name)
        return parts and parts[1]

    def prologue(self, name: str) -> fx.GraphModule | None:
        parts = self._emitted(name)
        return parts and parts[0]

    def _emitted(self, name: str) -> Parts | None:
        if name not in self._parts:
            with compile_lock, uncollected():
                self._parts[name] = self._parts[name] if name in self._parts else self._emit(name)
        return self._parts[name]


class Saved:
    """Saved values and the code that reads them: a pytree whose leaves are the values."""

    def __init__(self, saved: Iterable[Any], code: Code):
        self._saved, self._code = list(saved), code
        self._note_versions()

    @property
    def code(self) -> Code:
        """The programs that compute products from the values."""
        return self._code

    @property
    def labels(self) -> list[str]:
        """The names of the values that are kept of the forward pass."""
        return self._code.labels

    def _note_versions(self) -> None:
        self._versions = [_version(t) for t in self._saved]
        self._prologues: dict[str, list[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_saved": self._saved, "_code": self._code}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._note_versions()

    def _run(self, gm: fx.GraphModule, vectors: list[Tensor], batched: bool, name: str = "") -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():
            self._check_versions()
        return self._code.run(gm, self._kept(name), vectors, batched)

    def _check_versions(self) -> None:
        for value, version, label in zip(self._saved, self._versions, self._code.labels, strict=True):
            if _version(value) != version:
                raise ArgumentError(
                    f"{label} was changed in place since this product was made. Way out: use the product before the "
                    "optimizer's step, or call the compiled model again."
                )

    def _kept(self, name: str) -> list[Any]:
        """The values that a program reads besides its vectors."""
        prologue = self._code.prologue(name) if name else None
        if prologue is None:
            return self._saved
        if name not in self._prologues:
            self._prologues[name] = list(self._code.run(prologue, self._saved, [], False))
        return self._prologues[name]


def _version(value: Any) -> int | None:
    if torch.compiler.is_compiling() or not isinstance(value, Tensor) or value.is_inference():
        return None
    return version_of(value)


class Products(Saved, Mapping):
    """Parameter name -> its block's product; a pytree of the values kept from the forward pass."""

    def __getitem__(self, name: str) -> Block:
        if name not in self._code.shapes:
            raise KeyError(name)
        return Block(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._code.shapes)

    def __len__(self) -> int:
        return len(self._code.shapes)

    __hash__ = None  # type: ignore[assignment]


class Block:
    """A parameter's diagonal block as a callable: [V, *P] or [*P] -> the same shape."""

    def __init__(self, products: Products, name: str):
        self._products, self.name = products, name

    @property
    def graph_module(self) -> fx.GraphModule | None:
        """The emitted program, (*saved, vector) -> (result,); None where the block is zero."""
        return self._products._code.block(self.name)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The block times each vector. The first call of a block emits its program.

        Args:
            vectors: [V, *P] or [*P].

        Raises:
            ArgumentError: for another shape, dtype or device, or if a value that is kept was changed in place.
        """
        code = self._products._code
        _check_vectors(code, self.name, vectors)
        shape = code.shapes[self.name]
        batched = vectors.ndim > len(shape)
        if tuple(vectors.shape)[batched:] != shape or vectors.ndim > len(shape) + 1:
            both = f"{list(shape)} or [V, {', '.join(map(str, shape))}]"
            raise ArgumentError(f"the block of '{self.name}' multiplies {both}, not {list(vectors.shape)}")
        gm = code.block(self.name)
        if gm is None or batched and not len(vectors):
            return torch.zeros_like(vectors)
        if batched and len(vectors) == 1:
            return code.complete([self.name], self._products._run(gm, [vectors[0]], False, self.name))[0].unsqueeze(0)
        return code.complete([self.name], self._products._run(gm, [vectors], batched, self.name))[0]

    def __repr__(self) -> str:
        return f"Block('{self.name}', {list(self._products._code.shapes[self.name])})"


def _check_vectors(code: Code, name: str, vectors: Any) -> None:
    if not isinstance(vectors, Tensor):
        raise ArgumentError(f"the vectors of '{name}' are a {type(vectors).__name__}: pass a tensor")
    if vectors.dtype != code.dtypes[name] or vectors.device != code.devices[name]:
        raise ArgumentError(
            f"'{name}' is {code.dtypes[name]} on {code.devices[name]}, the vectors are {vectors.dtype} on {vectors.device}"
        )


class Operator(Saved):
    """A matrix over all parameters of a product, `op @ v`, in the order of the model's `named_parameters()`.

    Attributes:
        shape: (D, D), D the number of entries of these parameters.
        dtype, device: those of the first of these parameters.
        T: itself, as it is symmetric.
    """

    _code: AllBlocks

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(iter(self._code.dtypes.values()))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self._code.devices.values()))

    @property
    def T(self) -> Operator:  # noqa: N802
        """The matrix itself, which is symmetric."""
        return self

    def adjoint(self) -> Operator:
        """The matrix itself, which is symmetric."""
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """(D, D), D the number of entries of the parameters."""
        total = sum(prod(s) for s in self._code.shapes.values())
        return total, total

    @property
    def graph_module(self) -> fx.GraphModule:
        """The emitted program, (*saved, a vector per parameter) -> results."""
        return self._code.whole

    def __matmul__(self, v: dict[str, Tensor] | Tensor) -> dict[str, Tensor] | Tensor:
        """The product with a dict of tensors [*P] by name, a flat vector [D], or columns [D, K]; returned likewise.

        Raises:
            ArgumentError: for a vector of another structure, or if a value that the product keeps was changed in place.
        """
        shapes = self._code.shapes
        if isinstance(v, Mapping):
            if set(v) != set(shapes):
                raise ArgumentError(
                    f"the vector has {sorted(v)}, the operator {sorted(shapes)}: give one tensor for each"
                )
            for name, t in v.items():
                _check_vectors(self._code, name, t)
                if tuple(t.shape) != shapes[name]:
                    raise ArgumentError(f"'{name}' is {list(shapes[name])}, its vector {list(t.shape)}")
            return self._times(dict(v), False)
        if not isinstance(v, Tensor) or v.ndim not in (1, 2) or v.shape[0] != self.shape[0]:
            got, d = list(v.shape) if isinstance(v, Tensor) else type(v).__name__, self.shape[0]
            raise ArgumentError(f"the operator is {list(self.shape)}: multiply a dict, [{d}] or [{d}, K], not {got}")
        return self._times_flat(v)

    def _times(self, v: dict[str, Tensor], batched: bool) -> dict[str, Tensor]:
        code = self._code
        out = {name: torch.zeros_like(t) for name, t in v.items() if name not in code.outputs}
        if code.outputs:
            found = self._run(code.whole, [v[name] for name in code.inputs], batched)
            out.update(zip(code.outputs, code.complete(code.outputs, found), strict=True))
        return {name: out[name] for name in code.shapes}

    def _times_flat(self, v: Tensor) -> Tensor:
        if not v.numel():  # no columns
            return torch.zeros_like(v)
        code = self._code
        parts = torch.split(v, [prod(s) for s in code.shapes.values()])
        batched = v.ndim == 2
        named = {}
        for (name, shape), part in zip(code.shapes.items(), parts, strict=True):
            part = part.to(code.devices[name], code.dtypes[name])
            named[name] = part.t().reshape(v.shape[1], *shape) if batched else part.reshape(shape)
        found = self._times(named, batched)
        flat = [t.reshape(t.shape[0], -1).t() if batched else t.flatten() for t in found.values()]
        return torch.cat([t.to(v.device, v.dtype) for t in flat])

    def to_scipy(self):
        """This matrix as a `scipy.sparse.linalg.LinearOperator` (needs scipy)."""
        return linear_operator(self)

    def __repr__(self) -> str:
        return f"Operator({self.shape[0]} x {self.shape[1]})"


def _flatten(kept: Saved):
    return kept._saved, kept._code


pytree.register_pytree_node(
    Block,
    lambda block: (block._products._saved, (block._products._code, block.name)),
    lambda saved, context: Block(Products(saved, context[0]), context[1]),
)

for _class in (Products, Operator):
    pytree.register_pytree_node(_class, _flatten, lambda saved, code, cls=_class: cls(saved, code))
