"""Run captured forward passes: whether two of them compute the same, and whether that of two samples serves one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.front.requests import Request
from fxcurv.ir.graph import is_tensor
from fxcurv.ir.program import Program
from fxcurv.runtime.bind import bind, cuda_devices


def same(a: Program, b: Program, request: Request) -> bool:
    """Whether two captured programs compute the same at these arguments."""
    return _all_alike(_ends(a, _values(a, request)), _ends(b, _values(b, request)))


def serves_one(two: Program, one: Program, request: Request) -> bool:
    """Whether the graph of two samples computes at one sample what `one` does, and every value keeps its sample axis.

    It does not if the model squeezes, or looks at shapes (`if z.ndim == 0`).
    """
    try:
        values = _values(two, request)
        if not _all_alike(_ends(two, values), _ends(one, _values(one, request))):
            return False
    except (RuntimeError, ValueError, IndexError):
        return False
    return all(v.ndim == n.meta["val"].ndim for n, v in values.items() if is_tensor(n))


def _values(program: Program, request: Request) -> dict[fx.Node, Any]:
    """The values of a captured graph's nodes, with the same random numbers every time."""
    flat = bind(program, request.subject, request.arguments, 0, None)
    interpreter = fx.Interpreter(program.gm, garbage_collect_values=False)
    with torch.random.fork_rng(cuda_devices(flat)):
        torch.manual_seed(0)
        interpreter.run(*flat)
    return interpreter.env


def _ends(program: Program, values: dict[fx.Node, Any]) -> list[Any]:
    """The values that the graph returns, and the model's own output, which the loss may have broadcast."""
    heads = program.graph.find_nodes(op="call_function", target=torch.ops.fxcurv.head.default)
    return [values[node] for node in [*program.output.args[0], *heads]]


def _all_alike(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))


def alike(a: Any, b: Any) -> bool:
    """Whether two values of a graph are of the same dtype, and equal but for rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    limit = 100 * torch.finfo(a.dtype).eps
    return torch.allclose(
        a, b, rtol=limit, atol=limit * float(a.detach().abs().max()) if a.numel() else 0.0, equal_nan=True
    )
