"""Optimizers that divide the gradient by a running average of the curvature.

::

    optimizer = fxcurv.optim.KFAC(model, loss, lr=0.05, damping=1e-2)
    for x, y in loader:
        optimizer.step((x, y))  # in place of forward, backward and step; returns the result of the batch

A step computes the loss and the gradient, and every `interval` steps the curvature, in one program. For a mean over samples, so
that curvature and damping do not depend on the batch size::

    C <- decay C + (1 - decay) C_batch        (C + damping)^-1 (gradient + weight_decay p)

with the bias of a short average undone, as in Adam (Kingma & Ba 2015). Momentum is PyTorch's SGD's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxcurv.api import Compiled
from fxcurv.api import compile as compile_model
from fxcurv.errors import ArgumentError
from fxcurv.extensions import KFAC as KFACExtension
from fxcurv.extensions import KFLR, DiagGGNExact, DiagGGNMC, Extension
from fxcurv.ir.private import pytree
from fxcurv.kronecker import Arrangement, Blocks, Kronecker, matmul
from fxcurv.result import Result

__all__ = ["KFAC", "DiagGGN"]


class _Curved(Optimizer):
    """What both share; see the module.

    Args:
        model, loss: as for `fxcurv.compile`.
        extension: the curvature.
        params: parameters or groups of them, as for any optimizer (default: all that are trainable). A group may set `lr`,
            `momentum`, `damping` and `weight_decay`.
        lr: step size.
        momentum: of the preconditioned gradient.
        damping: what is added to the curvature's eigenvalues.
        weight_decay: of an L2 penalty, in the gradient.
        decay: of the running average of the curvature.
        interval: steps from one curvature to the next.
        options: those of `fxcurv.compile`.

    Raises:
        ArgumentError: for a number out of range, or a parameter that the model does not have.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], extension: Extension, params: Any, *, lr: float, momentum: float,
        damping: float, weight_decay: float, decay: float, interval: int, options: dict[str, Any],
    ):  # fmt: skip
        if not 0 <= decay < 1 or not isinstance(interval, int) or interval < 1:
            raise ArgumentError(f"decay={decay}, interval={interval}: use a number in [0, 1), and a positive integer")
        given = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(given, {"lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay})
        self.decay, self.interval, self._extension = decay, interval, extension
        self._names = {id(p): name for name, p in model.named_parameters()}
        for group in self.param_groups:
            self._check(group)
        names = tuple(self._names[id(p)] for group in self.param_groups for p in group["params"])
        self._plain: Compiled = compile_model(model, loss, [], params=names, **options)
        self._curved = self._plain.asking([extension])
        self._steps = self._updates = 0
        self._bases: dict[str, Any] = {}

    def _check(self, group: dict[str, Any]) -> None:
        for key, most in (("lr", None), ("damping", None), ("weight_decay", None), ("momentum", 1)):
            if not group[key] >= 0 or most is not None and group[key] >= most:
                raise ArgumentError(f"{key}={group[key]!r}: use a number that is not negative{', below 1' if most else ''}")
        for p in group["params"]:
            if id(p) not in self._names:
                raise ArgumentError(f"a parameter of shape {list(p.shape)} is none of the model's: pass those of the model")

    @torch.no_grad()
    def step(self, batch: Iterable[Any], seed: int | Tensor | None = None) -> Result:  # type: ignore[override]
        """One step on a batch (inputs, *targets); none on a batch without samples, which says nothing of the curvature.

        Args:
            batch: what the compiled model is called with.
            seed: of sampled columns, as for a call.

        Returns:
            its result, from before the step: loss, output and gradient.
        """
        inputs, *targets = batch
        update = self._steps % self.interval == 0
        result = (self._curved if update else self._plain)(inputs, *targets, seed=seed)
        samples = self._plain.arguments(inputs, *targets).batch_size
        if not sum(getattr(result, "sizes", (samples,))):
            return result
        if update:
            self._average(result[self._extension])
        self._steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                g = result.grad[self._names[id(p)]]
                g = g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else g
                direction = self._direction(p, g, group["damping"])
                if group["momentum"]:
                    before = self.state[p].get("momentum")
                    direction = direction if before is None else before.mul_(group["momentum"]).add_(direction)
                    self.state[p]["momentum"] = direction if before is not None else direction.clone()
                p.add_(direction, alpha=-group["lr"])
        return result

    def _average(self, field: dict[str, Any]) -> None:
        self._updates += 1
        self._bases = {}
        for group in self.param_groups:
            for p in group["params"]:
                new = field[self._names[id(p)]]
                old = self.state[p].get("curvature")
                leaves = pytree.tree_leaves(new)
                before = old if old is not None else [torch.zeros_like(t) for t in leaves]
                self.state[p]["curvature"] = [torch.lerp(a, b, 1 - self.decay) for a, b in zip(before, leaves, strict=True)]
                self._keep(p, new)

    def _averaged(self, p: Tensor) -> list[Tensor]:
        """The running average, its bias undone."""
        scale = 1 - self.decay**self._updates
        return [t / scale for t in self.state[p]["curvature"]]

    def _keep(self, p: Tensor, value: Any) -> None:
        """Note what of a value is no tensor."""

    def _direction(self, p: Tensor, g: Tensor, damping: float) -> Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """That of any optimizer, and the counts of steps."""
        return {**super().state_dict(), "steps": self._steps, "updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = {k: v for k, v in state_dict.items() if k not in ("steps", "updates")}
        super().load_state_dict(known)
        self._steps, self._updates, self._bases = state_dict["steps"], state_dict["updates"], {}


class DiagGGN(_Curved):
    """Steps by the diagonal of the generalised Gauss-Newton; see the module.

    Args:
        model, loss, params, lr, momentum, damping, weight_decay, decay, interval, options: see `KFAC`.
        mc_samples: sampled columns; None for the exact diagonal.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], params: Any = None, *, lr: float = 0.05, momentum: float = 0.9,
        damping: float = 1e-2, weight_decay: float = 0.0, decay: float = 0.95, interval: int = 1,
        mc_samples: int | None = 1, **options: Any,
    ):  # fmt: skip
        extension: Extension = DiagGGNExact() if mc_samples is None else DiagGGNMC(mc_samples)
        super().__init__(
            model, loss, extension, params, lr=lr, momentum=momentum, damping=damping, weight_decay=weight_decay, decay=decay,
            interval=interval, options=options,
        )  # fmt: skip

    def _direction(self, p: Tensor, g: Tensor, damping: float) -> Tensor:
        (diagonal,) = self._averaged(p)
        return (g / (diagonal + damping)).to(p.dtype)


class KFAC(_Curved):
    """Steps by Kronecker factors (Martens & Grosse 2015), damped by their pi; see the module.

    Args:
        model, loss: as for `fxcurv.compile`.
        params: parameters or groups of them (default: all that are trainable); groups may set `lr`, `momentum`, `damping`,
            `weight_decay`.
        lr: step size.
        momentum: of the preconditioned gradient.
        damping: d in (B + sqrt(d)/pi I) (x) (A + pi sqrt(d) I), see `fxcurv.kronecker.Blocks.damped`.
        weight_decay: of an L2 penalty, in the gradient.
        decay: of the running averages of the factors.
        interval: steps from one curvature to the next; factors are decomposed then, and used in between.
        mc_samples: sampled columns; None for the exact ones.
        weight_sharing: "backpack", "expand" or "reduce", as for the extension.
        options: those of `fxcurv.compile`.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], params: Any = None, *, lr: float = 0.05, momentum: float = 0.9,
        damping: float = 1e-2, weight_decay: float = 0.0, decay: float = 0.95, interval: int = 1,
        mc_samples: int | None = 1, weight_sharing: str = "expand", **options: Any,
    ):  # fmt: skip
        known: Any = {"weight_sharing": weight_sharing, "others": "exact"}
        extension: Extension = KFLR(**known) if mc_samples is None else KFACExtension(mc_samples, **known)
        super().__init__(
            model, loss, extension, params, lr=lr, momentum=momentum, damping=damping, weight_decay=weight_decay, decay=decay,
            interval=interval, options=options,
        )  # fmt: skip

    def _keep(self, p: Tensor, value: Any) -> None:
        a = value.arrangement
        self.state[p]["arrangement"] = [list(x) for x in (a.shape, a.sizes, a.outputs, a.inputs)]

    def _direction(self, p: Tensor, g: Tensor, damping: float) -> Tensor:
        name = self._names[id(p)]
        known, inverse = self._bases.get(name, (None, None))
        if known != damping:
            arrangement = Arrangement(*map(tuple, self.state[p]["arrangement"]))
            blocks = Blocks({name: Kronecker(self._averaged(p), arrangement)})
            inverse = blocks.inverse(damping, pi=True)[name]
            self._bases[name] = damping, inverse
        return matmul(inverse, g.to(inverse[0].dtype)).to(p.dtype)
