"""The captured forward pass as two plain functions for matrix-free products over data: parameters -> f, and f -> loss.

J^T u, J v      by one and by two passes of reverse mode through the first function
the columns s   of the loss Hessian at f, as the derivatives in b of a program for f + b
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.api import Compiled
from fxcurv.api import compile as fxcurv_compile
from fxcurv.errors import ArgumentError, UnsupportedOpError
from fxcurv.front.arguments import Arguments
from fxcurv.ir.graph import closure, copied
from fxcurv.ir.placement import Shard
from fxcurv.ir.program import Program
from fxcurv.runtime.bind import bind


class Halves:
    """The two halves of one kind of batch.

    Args:
        compiled: without extensions.
        names: the names of the parameters.
        inputs, targets: a batch.

    Attributes:
        names: the parameters in which derivatives are taken.
        program: of the kind of batch, as captured and analysed.
    """

    def __init__(self, compiled: Compiled, names: list[str], inputs: Any, targets: tuple):
        self._subject, self.names = compiled.subject, names
        self.program = compiled.lower(inputs, *targets, after="objective").program
        self._heads = list(self.program.heads)
        self._forward = _part(self.program, self._heads, [])
        self._loss = None if self.program.loss is None else _part(self.program, [self.program.loss], self._heads)
        self._kinds = [(i.kind, i.name) for i in self.program.inputs]
        self._columns: dict[Any, tuple[Compiled, list[int]]] = {}

    def serves(self, n: int) -> bool:
        """Whether the functions take a batch of `n` samples of this kind."""
        return n == self.program.batch.size or self.program.serves(n)

    def flat(self, arguments: Arguments) -> list[Any]:
        """The arguments of the functions."""
        return bind(self.program, self._subject, arguments, 0, None)

    def outputs(self, flat: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """(f, the parameters that it was made of), with the graph between them."""
        held = {
            name: t.detach().requires_grad_()
            for (kind, name), t in zip(self._kinds, flat, strict=True)
            if kind == "param"
        }
        given = [held[name] if kind == "param" else t for (kind, name), t in zip(self._kinds, flat, strict=True)]
        with torch.enable_grad():
            return list(self._forward(*given)), [held[name] for name in self.names if name in held]

    def rows(self, heads: list[Tensor]) -> Tensor:
        """f or a cotangent of it, [N, C]."""
        return torch.cat([t.movedim(p.dim, 0).flatten(1) for t, p in zip(heads, self._places(), strict=True)], 1)

    def back(self, rows: Tensor, heads: list[Tensor]) -> list[Tensor]:
        """[N, C] -> tensors in the shapes of f."""
        places = self._places()
        moved = [t.movedim(p.dim, 0) for t, p in zip(heads, places, strict=True)]
        parts = rows.split([t[0].numel() for t in moved], 1)
        return [x.reshape(t.shape).movedim(0, p.dim) for x, t, p in zip(parts, moved, places, strict=True)]

    def transposed(self, flat: list[Any], rows: Tensor) -> list[Tensor]:
        """J^T u, a tensor per parameter."""
        heads, held = self.outputs(flat)
        return _zeros_for_none(_grad(heads, held, self.back(rows, heads)), held)

    def times(self, flat: list[Any], vectors: list[Tensor]) -> Tensor:
        """J v, [N, C]: J^T u is linear in u, and its own transpose is J."""
        heads, held = self.outputs(flat)
        with torch.enable_grad():
            us = [torch.zeros_like(h).requires_grad_() for h in heads]
            pairs = zip(_grad(heads, held, us, True), vectors, strict=True)
            found = [(g, v) for g, v in pairs if g is not None and g.requires_grad]
        if not found:
            return self.rows([torch.zeros_like(h) for h in heads])
        out = torch.autograd.grad([g for g, _ in found], us, [v for _, v in found], allow_unused=True)
        return self.rows(_zeros_for_none(out, us))

    def gradient(self, flat: list[Any]) -> list[Tensor]:
        """The loss' gradient by these two functions, to be compared with another."""
        heads, held = self.outputs(flat)
        ends = [h.detach().requires_grad_() for h in heads]
        given = [
            t.detach().requires_grad_() if kind == "param" else t
            for (kind, _), t in zip(self._kinds, flat, strict=True)
        ]
        own = {name: t for (kind, name), t in zip(self._kinds, given, strict=True) if kind == "param"}
        direct = [own[name] for name in self.names if name in own]
        with torch.enable_grad():
            loss = self._loss(*given, *ends)[0]  # type: ignore[misc]
        us = _zeros_for_none(torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True), ends)
        rest = _zeros_for_none(torch.autograd.grad(loss, direct, allow_unused=True), direct)
        return [g + r for g, r in zip(_zeros_for_none(_grad(heads, held, us), held), rest, strict=True)]

    def columns(self, flat: list[Any], extension: Any, seed: int, first: int) -> Tensor:
        """The columns at f, [V, N, C], of the root `extension`; `first`: see `Compiled.part`."""
        heads = [h.detach() for h in self.outputs(flat)[0]]
        self._places()
        if extension not in self._columns:
            self._columns[extension] = self._compile_shifted(flat, heads, extension)
        compiled, used = self._columns[extension]
        found = compiled.counting().part(tuple(heads), *[flat[k] for k in used], seed=seed, first=first)[extension]
        return torch.cat([found[f"shift.{k}"].flatten(2) for k in range(len(heads))], 2)

    def _compile_shifted(self, flat: list[Any], heads: list[Tensor], extension: Any) -> tuple[Compiled, list[int]]:
        loss: Any = self._loss
        placeholders = list(loss.graph.find_nodes(op="placeholder"))
        used = [k for k, (kind, _) in enumerate(self._kinds) if kind in ("input", "target") and placeholders[k].users]
        kept = [t if k not in used else None for k, t in enumerate(flat)]
        batch_dim = tuple(p.dim for p in self._places())
        made = fxcurv_compile(
            Shift(heads, batch_dim), Ending(loss, kept, used), [extension], batch_dim=batch_dim, check=None
        )
        return made, used

    def _places(self) -> list[Shard]:
        places = [h.meta["place"] for h in self._heads]
        if not all(isinstance(p, Shard) and p.outer == p.inner == 1 for p in places):
            raise ArgumentError("the model's output has no axis of samples alone: return it as [N, ...]")
        return places

    def check(self, flat: list[Any], grads: dict[str, Tensor]) -> None:
        """Compare the gradient with another: an op that autograd differentiates differently would go unnoticed.

        Raises:
            UnsupportedOpError: if they differ.
        """
        found = self.gradient(flat)
        size = max(float(g.abs().amax()) for g in grads.values() if g.numel())
        near = 1e-8 if found[0].dtype == torch.float64 else 2e-2 if found[0].dtype != torch.float32 else 1e-3
        for name, g in zip(self.names, found, strict=True):
            if float((g - grads[name]).abs().amax()) > near * size:
                raise UnsupportedOpError(
                    f"the derivative in '{name}' by the captured graph is not the gradient: an op of the model has a backward "
                    "that PyTorch does not take there. Way out: the extensions BatchGrad, Jacobian or SqrtGGNExact."
                )


class Shift(nn.Module):
    """f + b, with b zero and the same for every sample's slice."""

    def __init__(self, heads: list[Tensor], dims: tuple[int, ...]):
        super().__init__()
        self.shift = nn.ParameterList(torch.zeros_like(h.select(d, 0)) for h, d in zip(heads, dims, strict=True))
        self.dims = dims

    def forward(self, *heads: Tensor) -> tuple[Tensor, ...]:
        return tuple((h.movedim(d, 0) + b).movedim(0, d) for h, b, d in zip(heads, self.shift, self.dims, strict=True))


class Ending(nn.Module):
    """The second half as a loss: of f, and of the inputs and targets that it reads."""

    def __init__(self, loss: fx.GraphModule, kept: list[Any], used: list[int]):
        super().__init__()
        self.loss, self.used = loss, used
        for k, t in enumerate(kept):
            if isinstance(t, Tensor):
                self.register_buffer(f"kept_{k}", t.detach(), persistent=False)
        self.plain = [None if isinstance(t, Tensor) else t for t in kept]

    def forward(self, heads: tuple[Tensor, ...], *given: Tensor) -> Tensor:
        read = dict(zip(self.used, given, strict=True))
        flat = [read[k] if k in read else getattr(self, f"kept_{k}", t) for k, t in enumerate(self.plain)]
        return self.loss(*flat, *heads)[0]


def _part(program: Program, results: list[fx.Node], stop: list[fx.Node]) -> fx.GraphModule:
    """`results` as a function of all placeholders and of the values in `stop`."""
    graph = fx.Graph()
    env = {n: graph.placeholder(n.name) for n in program.graph.nodes if n.op == "placeholder"}
    env |= {n: graph.placeholder(f"f_{k}") for k, n in enumerate(stop)}
    for node in closure(results, {*stop, *env}):
        if node not in env:
            env[node] = copied(graph, node, env)
    graph.output(tuple(env[n] for n in results))
    return fx.GraphModule(program.gm, graph)


def _grad(heads: list[Tensor], held: list[Tensor], us: list[Tensor], again: bool = False) -> list[Any]:
    reached = [(h, u) for h, u in zip(heads, us, strict=True) if h.requires_grad]
    if not reached:
        return [None] * len(held)
    hs, gs = zip(*reached, strict=True)
    return list(torch.autograd.grad(hs, held, gs, allow_unused=True, create_graph=again))


def _zeros_for_none(found: Any, like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, like, strict=True)]
