"""Transforms of `torch.func` inside a model or loss: the outermost one is traced by itself, and its ops are run in its place.

The trace of the model takes ops before autograd does, so it cannot see through a transform. A trace below `torch.func`
sees plain ops: its graph holds the derivatives written out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

from fxcurv.front.wrapped import Captured
from fxcurv.ir.emit import MATERIALISED
from fxcurv.ir.origin import running_line
from fxcurv.ir.private import (
    disable_proxy_modes_tracing,
    in_function_transform,
    make_fx,
    no_torch_functions,
    original,
    patched,
    pytree,
)

_AT = "torch._functorch.eager_transforms."
_TRANSFORMS = (
    f"{_AT}grad_impl",
    f"{_AT}grad_and_value_impl",
    f"{_AT}_jvp_with_argnums",
    "torch._functorch.apis.vmap_impl",
)


@contextlib.contextmanager
def traced_transforms(wrapped: Captured) -> Iterator[None]:
    """Trace `torch.func.grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`, `hessian`, `vmap` by themselves, in a capture.

    Args:
        wrapped: what is traced.
    """
    inside = _Inside(wrapped)
    with contextlib.ExitStack() as stack:
        for name in _TRANSFORMS:
            stack.enter_context(patched(name, inside.wrapped(original(name))))
        stack.enter_context(patched(f"{_AT}_vjp_with_argnums", inside.vjp(original(f"{_AT}_vjp_with_argnums"))))
        yield


class _Inside:
    """Traces outermost transforms as pieces; while it does (`tracing`), transforms inside a piece run as they are."""

    def __init__(self, wrapped: Captured) -> None:
        self.values, self.record, self.tracing = wrapped.values, wrapped.record, False

    def wrapped(self, transform: Callable) -> Callable:
        """The transform, traced by itself if it is the outermost."""

        @functools.wraps(transform)
        def run(*args, **kwargs):
            return self.piece(transform, args, kwargs)

        return run

    def vjp(self, transform: Callable) -> Callable:
        """`vjp`; the function that it returns is a piece of its own, which computes the forward pass again."""

        @functools.wraps(transform)
        def run(func, *primals, **kwargs):
            if self.tracing or in_function_transform():
                return transform(func, *primals, **kwargs)

            def pull(cotangents, *_, **__):
                return self.piece(lambda p, c: transform(func, *p, **kwargs)[1](c), (primals, cotangents), {})

            out = self.piece(lambda *p: [t for t in transform(func, *p, **kwargs) if not callable(t)], primals, {})
            return out[0], pull, *out[1:]

        return run

    def piece(self, fn: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`fn(*args, **kwargs)`, by running the ops of its own trace."""
        if self.tracing or in_function_transform():
            return fn(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        sized = self.values.sized()  # a function may read these, or their sizes, without being given them
        out_spec: Any = None
        rest: list[Any] = []

        def flat(*xs):
            nonlocal out_spec
            given = iter(xs[len(sized) :])
            args, kwargs = pytree.tree_unflatten(
                [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
            )
            out, out_spec = pytree.tree_flatten(fn(*args, **kwargs))
            rest[:] = out
            return [t for t in out if isinstance(t, Tensor)]

        self.record.notes[f"torch.func is traced by itself: {running_line().strip()}"] = None
        self.tracing = True
        try:
            with disable_proxy_modes_tracing(), no_torch_functions():
                gm = make_fx(flat, MATERIALISED)(*[t.detach() for t in (*sized, *tensors)])
        finally:
            self.tracing = False
        gm.graph.eliminate_dead_code()
        found = iter(fx.Interpreter(gm).run(*sized, *tensors))
        return pytree.tree_unflatten([next(found) if isinstance(t, Tensor) else t for t in rest], out_spec)
