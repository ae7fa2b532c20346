"""Optimizers that divide the gradient by the curvature: by a running average of it, or matrix-free by the batch's own.

::

    optimizer = fxcurv.optim.KFAC(model, loss, lr=0.05, damping=1e-2)
    for x, y in loader:
        optimizer.step((x, y))  # in place of forward, backward and step; returns the result of the batch

A step computes the loss and the gradient, and every `interval` steps the curvature, in one program. The loss should be
a mean over samples, so that curvature and damping do not depend on the batch size::

    C <- decay C + (1 - decay) C_batch        (C + damping)^-1 (gradient + weight_decay p)

The bias of a short average is corrected as in Adam (Kingma & Ba 2015). Momentum works as in PyTorch's SGD. A step reads `lr`,
`momentum`, `damping` and `weight_decay` from the groups, so schedulers, and loops that lower a group's damping, take effect.

For parameters of `fully_shard` (under `mesh=`), diagonals and momentum are kept in shards; Kronecker factors, and the
directions of conjugate gradients, are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxcurv.api import Compiled
from fxcurv.api import compile as compile_model
from fxcurv.errors import ArgumentError
from fxcurv.extensions import GGNMP, KFLR, DiagGGNExact, DiagGGNMC, Extension
from fxcurv.extensions import KFAC as KFACExtension
from fxcurv.extensions.kfac import Bases, MomentsIn
from fxcurv.ir.private import pytree
from fxcurv.kronecker import Blocks, Eigenbasis, Joint, Kronecker, Within, arranged, eigenbasis, plain
from fxcurv.result import Result
from fxcurv.runtime.sharded import like, whole

__all__ = ["EKFAC", "KFAC", "DiagGGN", "NaturalGradientCG"]

Named = dict[str, Tensor]
# Entries of a parameter's state: tensors that keep their dtype, whatever the parameter's is; and other values.
AVERAGES, NOTES = ("curvature", "basis", "moments"), ("arrangement", "within")


class _Curved(Optimizer):
    """Base of all optimizers here; see the module.

    Args:
        model, loss: as for `fxcurv.compile`.
        extension: the curvature.
        params: parameters or groups of them, as for any optimizer (default: all that are trainable). A group may set `lr`,
            `momentum`, `damping` and `weight_decay`.
        lr: step size.
        momentum: momentum of the preconditioned gradient.
        damping: added to the curvature's eigenvalues.
        weight_decay: weight of an L2 penalty, whose gradient is added, also where the loss does not read the parameter.
        decay: decay of the running average of the curvature.
        interval: number of steps from one curvature to the next.
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
        self._plain: Compiled = compile_model(model, loss, [], params=tuple(n for n, *_ in self._held()), **options)
        self._curved = self._plain.asking([extension])
        self._steps = self._updates = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in PyTorch, but only while the optimizer is made.

        Raises:
            ArgumentError: later, because the programs are of the parameters that the optimizer was made with.
        """
        if hasattr(self, "_plain"):
            raise ArgumentError(
                "add_param_group: the programs are of the parameters that it was made with; make a new optimizer"
            )
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        for key, most in (("lr", None), ("damping", None), ("weight_decay", None), ("momentum", 1)):
            if not group[key] >= 0 or most is not None and group[key] >= most:
                raise ArgumentError(
                    f"{key}={group[key]!r}: use a number that is not negative{', below 1' if most else ''}"
                )
        for p in group["params"]:
            if id(p) not in self._names:
                raise ArgumentError(
                    f"a parameter of shape {list(p.shape)} is none of the model's: pass those of the model"
                )

    def _held(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of each parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                yield self._names[id(p)], p, group

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """The attribute that `torch.amp.GradScaler.step` reads first."""
        raise ArgumentError(
            f"GradScaler scales a loss and reads p.grad, and {type(self).__name__}.step computes both itself. Way out: call "
            "optimizer.step(batch) without the scaler, under torch.autocast(dtype=torch.bfloat16), which needs none"
        )

    @torch.no_grad()
    def step(self, batch: Iterable[Any] | None = None, seed: int | Tensor | None = None) -> Result:  # type: ignore[override]
        """Take a step on a batch (inputs, *targets). A batch without samples changes nothing, as it has no curvature.

        Args:
            batch: the arguments of the compiled model.
            seed: the seed of sampled columns, as for a call.

        Returns:
            the result of the batch before the step: loss, output and gradient.

        Raises:
            ArgumentError: for an argument that is no batch.
        """
        if callable(batch) or isinstance(batch, Tensor) or batch is None:
            raise ArgumentError(
                f"step({type(batch).__name__}): pass a batch (inputs, *targets), whose curvature the step takes"
            )
        inputs, *targets = batch

        def call(compiled: Compiled) -> Result:
            return compiled(inputs, *targets, seed=seed)

        update = self._steps % self.interval == 0
        result = call(self._updating_program() if update else self._plain)
        samples = self._plain.arguments(inputs, *targets).batch_size
        if not sum(getattr(result, "sizes", (samples,))):
            return result
        if update:
            self._updates += 1
            self._add_curvature(result, call)
        self._steps += 1
        gradients: Named = {}
        for name, p, group in self._held():
            g = result.grad[name]
            gradients[name] = g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else g
        self._step_by(gradients, self._moves(self._directions(gradients)), call, result)
        return result

    def _updating_program(self) -> Compiled:
        """The program of a step that updates the curvature."""
        return self._curved

    def _add_curvature(self, result: Result, call: Callable[[Compiled], Result]) -> None:
        """Add a batch's curvature to the running average."""
        field = result[self._extension]
        for name, p, _ in self._held():
            self.state[p]["curvature"] = self._running_average(
                self.state[p].get("curvature"), pytree.tree_leaves(field[name])
            )

    def _running_average(self, before: list[Tensor] | None, new: list[Tensor]) -> list[Tensor]:
        """The running average, which starts from zero."""
        old = before if before is not None else [torch.zeros_like(t) for t in new]
        return [torch.lerp(a, b, 1 - self.decay) for a, b in zip(old, new, strict=True)]

    def _unbiased(self, averages: list[Tensor], updates: int) -> list[Tensor]:
        scale = 1 - self.decay**updates
        return [t / scale for t in averages]

    def _directions(self, gradients: Named) -> Named:
        raise NotImplementedError

    def _moves(self, directions: Named) -> Named:
        """The step of each parameter."""
        moves: Named = {}
        for name, p, group in self._held():
            direction = like(directions[name].to(p.dtype), p)
            if group["momentum"]:
                before = self.state[p].get("momentum")
                direction = direction.clone() if before is None else before.mul_(group["momentum"]).add_(direction)
                self.state[p]["momentum"] = direction
            moves[name] = direction.mul(-group["lr"])
        return moves

    def _step_by(self, gradients: Named, moves: Named, call: Callable[[Compiled], Result], result: Result) -> None:
        for name, p, _ in self._held():
            p.add_(moves[name])

    def _counts(self) -> dict[str, int]:
        return {"steps": self._steps, "updates": self._updates}

    def _restore_counts(self, counts: dict[str, int]) -> None:
        self._steps, self._updates = counts["steps"], counts["updates"]

    def state_dict(self) -> dict[str, Any]:
        """The state of any optimizer, and the counts of steps and updates."""
        return {**super().state_dict(), **self._counts()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counts = self._counts()
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in counts})
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        for (_, p, _), own in zip(self._held(), saved, strict=True):
            for key in set(own).intersection(AVERAGES):
                self.state[p][key] = [t.detach().to(p.device, copy=True) for t in own[key]]
            self.state[p].update({key: own[key] for key in NOTES if key in own})  # PyTorch's cast takes names apart
        self._restore_counts(state_dict)  # type: ignore[arg-type]


class DiagGGN(_Curved):
    """Steps by the diagonal of the generalised Gauss-Newton; see the module.

    Args:
        model, loss, params, lr, momentum, damping, weight_decay, decay, interval, options: see `KFAC`.
        mc_samples: number of sampled columns; None for the exact diagonal.
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

    def _directions(self, gradients: Named) -> Named:
        found: Named = {}
        for name, p, group in self._held():
            (diagonal,) = self._unbiased(self.state[p]["curvature"], self._updates)
            found[name] = gradients[name] / (diagonal + group["damping"])
        return found


class _Factored(_Curved):
    """Base of those with Kronecker factors: a group's matrix of blocks is inverted once, and used until it changes."""

    def __init__(self, *args: Any, **known: Any):
        super().__init__(*args, **known)
        self._inverses: dict[int, tuple[float, Blocks]] = {}

    def _add_curvature(self, result: Result, call: Callable[[Compiled], Result]) -> None:
        super()._add_curvature(result, call)
        self._inverses = {}
        field = result[self._extension]
        together = {name: group for name, _, group in self._held()}
        for name, p, group in self._held():
            value = field[name]
            if isinstance(value, Within):
                self.state[p]["within"] = value.weight
                continue
            self.state[p]["arrangement"] = plain(value.arrangement)
            if isinstance(value.arrangement, Joint) and together[value.arrangement.bias_name] is not group:
                raise ArgumentError(
                    f"'{name}' and '{value.arrangement.bias_name}' have one block, and are in two groups: put both into one"
                )

    def _factors(self, p: Tensor) -> Kronecker | Within:
        """The running averages of a parameter's factors."""
        own = self.state[p]
        if "within" in own:
            return Within(own["within"])
        return Kronecker(self._unbiased(own["curvature"], self._factor_updates()), arranged(own["arrangement"]))

    def _factor_updates(self) -> int:
        """The number of batches in the averages of factors."""
        return self._updates

    def _inverse(self, named: dict[str, Tensor], damping: float) -> Blocks:
        raise NotImplementedError

    def _directions(self, gradients: Named) -> Named:
        found: Named = {}
        gradients = whole(gradients)
        for k, group in enumerate(self.param_groups):
            named = {self._names[id(p)]: p for p in group["params"]}
            known, inverse = self._inverses.get(k, (None, None))
            if known != group["damping"] or inverse is None:
                inverse = self._inverse(named, group["damping"])
                self._inverses[k] = group["damping"], inverse
            found |= inverse @ {name: gradients[name].to(inverse.dtype) for name in named}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._inverses = {}


class KFAC(_Factored):
    """Steps by Kronecker factors (Martens & Grosse 2015), each damped by the paper's pi; see the module.

    Args:
        model, loss: as for `fxcurv.compile`.
        params: parameters or groups of them (default: all that are trainable); groups may set `lr`, `momentum`, `damping`,
            `weight_decay`.
        lr: step size.
        momentum: momentum of the preconditioned gradient.
        damping: d in (B + sqrt(d)/pi I) (x) (A + pi sqrt(d) I), see `fxcurv.kronecker.Blocks.damped`.
        weight_decay: weight of an L2 penalty, whose gradient is added.
        decay: decay of the running averages of the factors.
        interval: number of steps from one curvature to the next; factors are decomposed only then.
        mc_samples: number of sampled columns; None for the exact ones.
        weight_sharing: "backpack", "expand" or "reduce", as for the extension.
        joint: one block for a layer's weight and bias, as for the extension; both have to be in one group.
        options: those of `fxcurv.compile`.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], params: Any = None, *, lr: float = 0.05, momentum: float = 0.9,
        damping: float = 1e-2, weight_decay: float = 0.0, decay: float = 0.95, interval: int = 1,
        mc_samples: int | None = 1, weight_sharing: str = "expand", joint: bool = False, **options: Any,
    ):  # fmt: skip
        known: Any = {"weight_sharing": weight_sharing, "others": "exact", "joint": joint}
        extension: Extension = KFLR(**known) if mc_samples is None else KFACExtension(mc_samples, **known)
        super().__init__(
            model, loss, extension, params, lr=lr, momentum=momentum, damping=damping, weight_decay=weight_decay, decay=decay,
            interval=interval, options=options,
        )  # fmt: skip

    def _inverse(self, named: dict[str, Tensor], damping: float) -> Blocks:
        return Blocks({name: self._factors(p) for name, p in named.items()}).inverse(damping, pi=True)


class EKFAC(_Factored):
    """Steps by second moments in the eigenbasis of Kronecker factors (George et al. 2018); see the module.

    Every `interval` steps the batch's moments in the current basis enter their running average. Every
    `basis_interval`-th of these updates first adds the batch's factors to their averages, and takes the basis from
    those; it calls a second program on the batch. When the basis turns, the averaged moments turn with it: seen as a
    diagonal matrix in the old basis, their new values are its diagonal in the new one.

    Args:
        model, loss, params, lr, momentum, weight_decay, weight_sharing, joint, options: see `KFAC`.
        damping: added to the moments.
        decay: decay of the running averages of factors and moments.
        interval: number of steps from one update of the moments to the next.
        basis_interval: number of these updates from one basis to the next.
        iterations: None for eigendecompositions; a number for that many orthogonal iterations from the last basis
            (`fxcurv.kronecker.eigenbasis`), which cost less but follow the factors slowly.
        mc_samples: number of sampled columns.
        fisher: "mc" or "empirical", as for the extension.
        others: as for the extension.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], params: Any = None, *, lr: float = 0.05, momentum: float = 0.9,
        damping: float = 1e-2, weight_decay: float = 0.0, decay: float = 0.95, interval: int = 1, basis_interval: int = 10,
        iterations: int | None = None, mc_samples: int = 1, fisher: str = "mc", weight_sharing: str = "expand",
        others: str = "auto", joint: bool = False, **options: Any,
    ):  # fmt: skip
        for key, value in (("basis_interval", basis_interval), ("iterations", iterations)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{key}={value!r}: use a positive integer")
        self.basis_interval, self.iterations = basis_interval, iterations
        self._extension_options: Any = {
            "mc_samples": mc_samples, "fisher": fisher, "weight_sharing": weight_sharing, "others": others, "joint": joint
        }  # fmt: skip
        self._bases: dict[str, Any] = {}
        self._moments: tuple[MomentsIn, Compiled] | None = None
        super().__init__(
            model, loss, KFACExtension(**self._extension_options), params, lr=lr, momentum=momentum, damping=damping,
            weight_decay=weight_decay, decay=decay, interval=interval, options=options,
        )  # fmt: skip

    def _updating_program(self) -> Compiled:
        return self._curved if self._updates % self.basis_interval == 0 or self._moments is None else self._moments[1]

    def _factor_updates(self) -> int:
        return 1 + (self._updates - 1) // self.basis_interval

    def _add_curvature(self, result: Result, call: Callable[[Compiled], Result]) -> None:
        if self._extension in result.extensions:
            super()._add_curvature(result, call)
            self._turn_basis()
            result = call(self._moments[1])  # type: ignore[index]
        self._inverses = {}
        moments = whole(result[self._moments[0]])  # type: ignore[index]
        for name, p, _ in self._held():
            if name in self._bases:
                self.state[p]["moments"] = self._running_average(self.state[p].get("moments"), [moments[name]])

    def _turn_basis(self) -> None:
        """Turn to the basis of the current factors, in the same tensors, which the program of the moments reads."""
        for name, p, _ in self._held():
            factors = self._factors(p)
            if isinstance(factors, Within):
                continue
            old = self._bases.get(name)
            start = Eigenbasis([*old, old[0]], old.arrangement) if old is not None and self.iterations else None
            new = eigenbasis(factors, start, self.iterations or 1)[:-1]
            if old is None:
                self._bases[name] = Kronecker(new, factors.arrangement)
            else:
                self.state[p]["moments"] = [_turn_moments(m, old, new) for m in self.state[p]["moments"]]
                for q, fresh in zip(old, new, strict=True):
                    q.copy_(fresh)
            self.state[p]["basis"] = list(self._bases[name])
        self._moments = self._moments or self._program_of_moments()

    def _program_of_moments(self) -> tuple[MomentsIn, Compiled]:
        known: dict[str, Any] = {name: self._factors(p) for name, p, _ in self._held() if "within" in self.state[p]}
        extension = MomentsIn(**self._extension_options, bases=Bases(known | self._bases))
        return extension, self._plain.asking([extension])

    def _inverse(self, named: dict[str, Tensor], damping: float) -> Blocks:
        blocks: dict[str, Any] = {}
        for name, p in named.items():
            if name in self._bases:
                moments = self._unbiased(self.state[p]["moments"], self._updates)
                blocks[name] = Eigenbasis([*self._bases[name], *moments], self._bases[name].arrangement)
            else:
                blocks[name] = self._factors(p)
        return Blocks(blocks).inverse(damping)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._bases = {
            name: Kronecker(self.state[p]["basis"], arranged(self.state[p]["arrangement"]))
            for name, p, _ in self._held() if "basis" in self.state[p]
        }  # fmt: skip
        self._moments = self._program_of_moments() if self._bases else None


def _turn_moments(moments: Tensor, old: list[Tensor], new: list[Tensor]) -> Tensor:
    """The diagonal, in the new basis, of the matrix that is diag(moments) in the old one."""
    turns = [None if q.ndim == 1 else (fresh.mT @ q).square() for q, fresh in zip(old, new, strict=True)]
    found = moments if turns[0] is None else turns[0] @ moments
    return found if len(turns) == 1 or turns[1] is None else found @ turns[1].mT


class NaturalGradientCG(_Curved):
    """Steps d from (G + damping I) d = gradient by conjugate gradients, matrix-free (Martens 2010).

    G is the batch's Gauss-Newton. If the loss is a negative log-likelihood, G is the Fisher matrix and d the natural
    gradient. A step costs the gradient and one product per iteration, and stores no factors. With a small batch G has
    few eigenvalues above zero, so the damping decides how far a step goes.

    Args:
        model, loss, params, lr, momentum, weight_decay, options: see `KFAC`.
        damping: added to G's eigenvalues, a number per group.
        iterations: the largest number of iterations in a step.
        tol: iterations end when the norm of the residual is at most `tol` times that of the gradient.
        warm: iterations start from the last direction times `warm`.
        adaptive: change all dampings after every step (Levenberg-Marquardt): times 3/2 if the loss falls by less than
            1/4 of what the quadratic model predicts, times 2/3 if by more than 3/4. It costs a forward pass on the same
            batch, and is meaningful only for models without dropout.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], params: Any = None, *, lr: float = 1.0, momentum: float = 0.0,
        damping: float = 1e-2, weight_decay: float = 0.0, iterations: int = 10, tol: float = 1e-3, warm: float = 0.95,
        adaptive: bool = False, **options: Any,
    ):  # fmt: skip
        if not isinstance(iterations, int) or iterations < 1 or not tol >= 0 or not 0 <= warm <= 1:
            raise ArgumentError(
                f"iterations={iterations}, tol={tol}, warm={warm}: use a positive integer, a number that is not negative, and "
                "one in [0, 1]"
            )
        self.iterations, self.tol, self.warm = iterations, tol, warm
        super().__init__(
            model, loss, GGNMP(), params, lr=lr, momentum=momentum, damping=damping, weight_decay=weight_decay, decay=0.0,
            interval=1, options=options,
        )  # fmt: skip
        names = tuple(n for n, *_ in self._held())
        trial = {**options, "update_buffers": False}
        self._trial: Compiled | None = compile_model(model, loss, [], params=names, **trial) if adaptive else None
        self._matrix: Any = None

    def _add_curvature(self, result: Result, call: Callable[[Compiled], Result]) -> None:
        self._matrix = result.ggn

    def _directions(self, gradients: Named) -> Named:
        damping, gradients = {name: group["damping"] for name, _, group in self._held()}, whole(gradients)
        start = {name: self.state[p].get("direction") for name, p, _ in self._held()}
        x = {name: torch.zeros_like(gradients[name]) if d is None else d * self.warm for name, d in start.items()}

        def times(v: Named) -> Named:
            return {name: t + damping[name] * v[name] for name, t in (self._matrix @ v).items()}

        found = conjugate_gradients(times, gradients, x, self.iterations, self.tol)
        for name, p, _ in self._held():
            self.state[p]["direction"] = found[name]
        return found

    def _step_by(self, gradients: Named, moves: Named, call: Callable[[Compiled], Result], result: Result) -> None:
        if self._trial is None:
            self._matrix = None
            super()._step_by(gradients, moves, call, result)
            return
        there, at = whole(moves), whole({n: p for n, p, _ in self._held()})
        penalty = sum((g["weight_decay"] * (at[n] * there[n]).sum() for n, _, g in self._held()), torch.zeros(()))
        square = sum((g["weight_decay"] * there[n].square().sum() / 2 for n, _, g in self._held()), torch.zeros(()))
        expected = _dot(whole(gradients), there) + _dot(there, self._matrix @ there) / 2 + square
        self._matrix = None
        super()._step_by(gradients, moves, call, result)
        found = call(self._trial).loss - result.loss + penalty + square
        ratio = float(found / expected) if float(expected) < 0 else 0.0
        for group in self.param_groups:
            group["damping"] *= 1.5 if not ratio >= 0.25 else 2 / 3 if ratio > 0.75 else 1


def conjugate_gradients(times: Callable[[Named], Named], b: Named, x: Named, iterations: int, tol: float) -> Named:
    """x with A x = b, for a positive definite A (Hestenes & Stiefel 1952).

    Args:
        times: the product with A.
        x: where to start.
        iterations: the largest number of products, besides the first one.
        tol: stop when the norm of the residual is at most `tol` times that of b.
    """
    r = {n: b[n] - t for n, t in times(x).items()}
    p, squared, enough = r, _dot(r, r), tol**2 * _dot(b, b)
    for _ in range(iterations):
        if not bool(squared > enough):
            break
        ap = times(p)
        curvature = _dot(p, ap)
        if not bool(curvature > 0):  # by rounding
            break
        step = squared / curvature
        x = {n: t + step * p[n] for n, t in x.items()}
        r = {n: t - step * ap[n] for n, t in r.items()}
        before, squared = squared, _dot(r, r)
        p = {n: t + squared / before * p[n] for n, t in r.items()}
    return x


def _dot(a: Named, b: Named) -> Tensor:
    return torch.stack([(t * b[n]).sum() for n, t in a.items()]).sum()
