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

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fxcurv.api import Compiled
from fxcurv.api import compile as compile_model
from fxcurv.errors import ArgumentError, NonFiniteError
from fxcurv.extensions import GGNMP, KFLR, DiagGGNExact, DiagGGNMC, Extension
from fxcurv.extensions import KFAC as KFACExtension
from fxcurv.extensions.kfac import Bases, MomentsIn
from fxcurv.ir.private import pytree
from fxcurv.kronecker import (
    Blocks,
    Eigenbasis,
    Joint,
    Kronecker,
    Within,
    arranged,
    check_not_negative,
    eigenbasis,
    plain,
)
from fxcurv.result import Result
from fxcurv.runtime.ranks import Ranks
from fxcurv.runtime.sharded import like, whole

__all__ = ["EKFAC", "KFAC", "DiagGGN", "NaturalGradientCG"]

Named = dict[str, Tensor]
# Entries of a parameter's state: tensors that keep their dtype, whatever the parameter's is; and other values.
AVERAGES, NOTES = ("curvature", "basis", "moments"), ("arrangement", "within")


@dataclass(frozen=True)
class _Of:
    """The predicate of `compile(params=)` that takes the parameters of these names, as far as they are trained."""

    names: tuple[str, ...]  # in an order, as ranks compare options

    def __call__(self, name: str, parameter: nn.Parameter) -> bool:
        return name in self.names


class _Curved(Optimizer):
    """Base of all optimizers here; see the module.

    Parameters that are frozen are skipped, for as long as they are. Copies, also those by `pickle`, have a copy of the model.

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

    decay: float
    interval: int
    _names: dict[int, str]
    _of: _Of
    _extension: Extension
    _curved: Compiled
    _steps: int
    _updates: int

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], extension: Extension, params: Any, *, lr: float, momentum: float,
        damping: float, weight_decay: float, decay: float, interval: int, options: dict[str, Any],
    ):  # fmt: skip
        if not isinstance(decay, Real) or not 0 <= decay < 1 or not isinstance(interval, int) or interval < 1:
            raise ArgumentError(
                f"decay={decay!r}, interval={interval!r}: use a number in [0, 1), and a positive integer"
            )
        given = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(given, {"lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay})
        self.decay, self.interval, self._extension = decay, interval, extension
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._check_groups()
        self._of = _Of(tuple(self._names[id(p)] for p in self._params()))
        self._plain: Compiled = compile_model(model, loss, [], params=self._of, **options)
        self._curved = self._plain.asking([extension])
        self._steps = self._updates = 0
        self._covered: list[str] = []  # the parameters of the last update of the curvature

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

    def _check_groups(self) -> None:
        for group in self.param_groups:
            for key in ("lr", "damping", "weight_decay", "momentum"):
                check_not_negative(key, group[key])
            if group["momentum"] >= 1:
                raise ArgumentError(f"momentum={group['momentum']!r}: use a number below 1")
        for p in self._params():
            if id(p) not in self._names:
                raise ArgumentError(
                    f"a parameter of shape {list(p.shape)} is none of the model's: pass those of the model"
                )

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _held(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of each parameter that is not frozen."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield self._names[id(p)], p, group

    def _changed(self) -> bool:
        """Whether other parameters are trained than at the last update of the curvature."""
        return self._covered != [name for name, *_ in self._held()]

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
            ArgumentError: for an argument that is no batch; for a number of a group that is out of range; under `mesh=`, for a
                batch that is empty on every rank.
            NonFiniteError: for a gradient or a curvature with NaN or infinity; no weight has changed then.
        """
        inputs, *targets = _unpacked(batch)
        self._check_groups()

        def call(compiled: Compiled) -> Result:
            return compiled(inputs, *targets, seed=seed)

        if self._plain.ranks is None and not self._plain.arguments(inputs, *targets).batch_size:
            return call(self._plain)
        update = self._steps % self.interval == 0 or self._changed()
        result = call(self._updating_program() if update else self._plain)
        self._check_finite(result)
        if update:
            self._add_curvature(result, call)
            self._updates += 1
            self._covered = [name for name, *_ in self._held()]
        self._steps += 1
        gradients: Named = {}
        for name, p, group in self._held():
            g = result.grad[name]
            gradients[name] = g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else g
        directions = self._directions(gradients)
        _refuse_non_finite("direction", directions, self._plain.ranks)
        self._step_by(gradients, self._moves(directions), call, result)
        return result

    def _check_finite(self, result: Result) -> None:
        """Refuse a batch's numbers before they enter an average."""
        for what, named in (("gradient", result.grad), *(("curvature", result[e]) for e in result.extensions)):
            _refuse_non_finite(what, named, self._plain.ranks)

    def _updating_program(self) -> Compiled:
        """The program of a step that updates the curvature."""
        return self._curved

    def _add_curvature(self, result: Result, call: Callable[[Compiled], Result]) -> None:
        """Add a batch's curvature to the running average."""
        for name, p, _ in self._held():
            self._average(p, "curvature", pytree.tree_leaves(result[self._extension][name]))

    def _average(self, p: Tensor, key: str, new: list[Tensor]) -> None:
        """Add to a running average of a parameter, which starts from zero."""
        own = self.state[p]
        old = own[key] if key in own else [torch.zeros_like(t) for t in new]
        own[key] = [torch.lerp(a, b, 1 - self.decay) for a, b in zip(old, new, strict=True)]
        # of its own, as it may have been frozen at some updates; tensors, which torch.distributed.checkpoint reads into
        counts = own.get("counts", {})
        own["counts"] = {**counts, key: counts.get(key, torch.zeros((), dtype=torch.long, device="cpu")) + 1}

    def _unbiased(self, p: Tensor, key: str) -> list[Tensor]:
        scale = 1 - self.decay ** int(self.state[p]["counts"][key])
        return [t / scale for t in self.state[p][key]]

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

    def _progress(self) -> dict[str, Any]:
        """What a state has beside PyTorch's entries; `kind`: what has to be equal for a state to go on from."""
        blocks = {
            k: getattr(self._extension, k) for k in ("weight_sharing", "others", "joint") if hasattr(self._extension, k)
        }
        kind = {"optimizer": type(self).__name__, **blocks}
        return {"steps": self._steps, "updates": self._updates, "covered": list(self._covered), "kind": kind}

    def state_dict(self) -> dict[str, Any]:
        """The state of any optimizer, the counts of steps and updates, and what they are of."""
        return {**super().state_dict(), **self._progress()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of such an optimizer gave.

        Raises:
            ArgumentError: for the state of another optimizer, or of parameters of other shapes.
            ValueError: for other groups, by PyTorch.
        """
        known = self._progress()
        if not isinstance(state_dict, Mapping) or state_dict.get("kind") != known["kind"]:
            got = state_dict.get("kind") if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ArgumentError(
                f"the state is of {got or 'another optimizer'}, this one is {known['kind']}: load a state_dict() of the same "
                "kind, or begin anew"
            )
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        for p, own in zip(self._params(), saved, strict=False):
            if any(shape != tuple(p.shape) for shape in _shapes_in(own)):
                raise ArgumentError(
                    f"the state is of other parameters than '{self._names[id(p)]}' {list(p.shape)}: load that of the same model"
                )
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in known})
        for p, own in zip(self._params(), saved, strict=True):
            for key in set(own).intersection(AVERAGES):
                self.state[p][key] = [t.detach().to(p.device, copy=True) for t in own[key]]
            if "counts" in own:
                self.state[p]["counts"] = {key: t.cpu().clone() for key, t in own["counts"].items()}
            self.state[p].update({key: own[key] for key in NOTES if key in own})  # PyTorch's cast takes names apart
        self._steps, self._updates = state_dict["steps"], state_dict["updates"]
        self._covered = list(state_dict["covered"])
        self._make_again()

    def _make_again(self) -> None:
        """Make what follows from the state, which has just come from elsewhere."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: all but hooks, as in PyTorch, and what `_make_again` makes."""
        made = ("step", "_names", "_inverses", "_bases", "_moments", "_matrix")  # step: as a scheduler wraps it
        kept = {k: v for k, v in vars(self).items() if k not in made and not k.startswith("_optimizer_")}
        return {**kept, "names": [self._names[id(p)] for p in self._params()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "names"})
        if "names" in state:  # PyTorch's load_state_dict calls this too, without
            self._names = dict(zip(map(id, self._params()), state["names"], strict=True))
            self._make_again()


def _unpacked(batch: Any) -> list[Any]:
    """The arguments in a batch."""
    if isinstance(batch, Iterable) and not isinstance(batch, Tensor | str | bytes | Mapping) and not callable(batch):
        found = list(batch)
        if found:
            return found
    raise ArgumentError(
        f"step({type(batch).__name__}): pass a batch (inputs, *targets), whose curvature the step takes"
    )


def _shapes_in(own: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """The shapes, all equal, of the parameter that a state is of."""
    averages = own.get("curvature", ()) if not set(own) & set(NOTES) else ()
    yield from (tuple(t.shape) for t in (*averages, *(own[k] for k in ("momentum", "direction") if k in own)))
    if "arrangement" in own:
        arrangement = arranged(own["arrangement"])
        yield (arrangement.weight if isinstance(arrangement, Joint) else arrangement).shape


def _refuse_non_finite(what: str, named: Mapping[str, Any], ranks: Ranks | None = None) -> None:
    """Refuse NaN and infinity: on every rank, if one has them in its shards.

    Args:
        what: the "gradient" of parameters, or their "curvature", or "direction".
        named: parameter name -> tensors in a pytree.

    Raises:
        NonFiniteError: naming the parameter.
    """
    leaves = [(n, t) for n, value in named.items() for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    local = [(n, t.to_local() if isinstance(t, DTensor) else t) for n, t in leaves]

    def check() -> None:
        finite = [t.isfinite().all().to(local[0][1].device) for _, t in local]
        if finite and not bool(torch.stack(finite).all()):
            raise _non_finite(what, next(n for (n, _), one in zip(local, finite, strict=True) if not bool(one)))

    if ranks is not None and any(isinstance(t, DTensor) for _, t in leaves):
        ranks.together(check)
    else:
        check()


def _non_finite(what: str, name: str) -> NonFiniteError:
    return NonFiniteError(
        f"the {what} of '{name}' is not finite (NaN or infinity), so there is no step: no weight has changed.\n"
        "Way out: skip this batch (except fxcurv.errors.NonFiniteError), if there are such numbers in it; a damping= above zero, "
        "if only the direction is not finite; else the weights have diverged: go back to earlier ones, with a smaller lr="
    )


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
            (diagonal,) = self._unbiased(p, "curvature")
            found[name] = gradients[name] / (diagonal + group["damping"])
        return found


class _Factored(_Curved):
    """Base of those with Kronecker factors: a group's matrix of blocks is inverted once, and used until it changes."""

    _inverses: dict[int, tuple[float, Blocks]]

    def __init__(self, *args: Any, **known: Any):
        super().__init__(*args, **known)
        self._make_again()

    def _make_again(self) -> None:
        self._inverses = {}

    def _add_curvature(self, result: Result, call: Callable[[Compiled], Result]) -> None:
        self._inverses = {}
        field, groups = result[self._extension], {name: group for name, _, group in self._held()}
        for name, group in groups.items():
            arrangement = getattr(field[name], "arrangement", None)
            if isinstance(arrangement, Joint) and groups[arrangement.bias_name] is not group:
                raise ArgumentError(
                    f"'{name}' and '{arrangement.bias_name}' have one block, and are in two groups: put both into one"
                )
        for name, p, _ in self._held():
            value, own = field[name], self.state[p]
            notes = {"within": value.weight} if isinstance(value, Within) else {"arrangement": plain(value.arrangement)}
            if any(own.get(key) != notes.get(key) for key in NOTES):
                self._forget(name, p)  # its block was another one: a weight's bias has been frozen, say
            own.update(notes)
        super()._add_curvature(result, call)

    def _forget(self, name: str, p: Tensor) -> None:
        """Forget a parameter's averages."""
        for key in (*AVERAGES, *NOTES, "counts"):
            self.state[p].pop(key, None)

    def _factors(self, p: Tensor) -> Kronecker | Within:
        """The running averages of a parameter's factors."""
        own = self.state[p]
        if "within" in own:
            return Within(own["within"])
        return Kronecker(self._unbiased(p, "curvature"), arranged(own["arrangement"]))

    def _inverse(self, named: dict[str, Tensor], damping: float) -> Blocks:
        raise NotImplementedError

    def _directions(self, gradients: Named) -> Named:
        found: Named = {}
        gradients = whole(gradients)
        for k, group in enumerate(self.param_groups):
            named = {self._names[id(p)]: p for p in group["params"] if p.requires_grad}
            known, inverse = self._inverses.get(k, (None, None))
            if named and (known != group["damping"] or inverse is None):
                inverse = self._inverse(named, group["damping"])
                self._inverses[k] = group["damping"], inverse
            if inverse is not None:
                found |= inverse @ {name: gradients[name].to(inverse.dtype) for name in named}
        return found


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
        super().__init__(
            model, loss, KFACExtension(**self._extension_options), params, lr=lr, momentum=momentum, damping=damping,
            weight_decay=weight_decay, decay=decay, interval=interval, options=options,
        )  # fmt: skip

    def _make_again(self) -> None:
        super()._make_again()
        self._bases: dict[str, Any] = {
            self._names[id(p)]: Kronecker(self.state[p]["basis"], arranged(self.state[p]["arrangement"]))
            for p in self._params() if "basis" in self.state[p]
        }  # fmt: skip
        self._moments = self._program_of_moments() if self._bases else None

    def _updating_program(self) -> Compiled:
        turn = self._updates % self.basis_interval == 0 or self._moments is None or self._changed()
        return self._curved if turn else self._moments[1]  # type: ignore[index]

    def _add_curvature(self, result: Result, call: Callable[[Compiled], Result]) -> None:
        if self._extension in result.extensions:
            super()._add_curvature(result, call)
            self._turn_basis()
            result = call(self._moments[1])  # type: ignore[index]
            self._check_finite(result)
        self._inverses = {}
        moments = whole(result[self._moments[0]])  # type: ignore[index]
        for name, p, _ in self._held():
            if name in self._bases:
                self._average(p, "moments", [moments[name]])

    def _forget(self, name: str, p: Tensor) -> None:
        super()._forget(name, p)
        self._bases.pop(name, None)

    def _turn_basis(self) -> None:
        """Turn to the basis of the current factors, in the same tensors, which the program of the moments reads."""
        before = set(self._bases)
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
                if "moments" in self.state[p]:
                    self.state[p]["moments"] = [_turn_moments(m, old, new) for m in self.state[p]["moments"]]
                for q, fresh in zip(old, new, strict=True):
                    q.copy_(fresh)
            self.state[p]["basis"] = list(self._bases[name])
        if self._moments is None or before != set(self._bases):  # programs read tensors, not names
            self._moments = self._program_of_moments()

    def _program_of_moments(self) -> tuple[MomentsIn, Compiled]:
        own = {self._names[id(p)]: self.state[p] for p in self._params()}
        known: dict[str, Any] = {name: Within(state["within"]) for name, state in own.items() if "within" in state}
        extension = MomentsIn(**self._extension_options, bases=Bases(known | self._bases))
        return extension, self._plain.asking([extension])

    def _inverse(self, named: dict[str, Tensor], damping: float) -> Blocks:
        blocks: dict[str, Any] = {}
        for name, p in named.items():
            if name in self._bases:
                moments = self._unbiased(p, "moments")
                blocks[name] = Eigenbasis([*self._bases[name], *moments], self._bases[name].arrangement)
            else:
                blocks[name] = self._factors(p)
        return Blocks(blocks).inverse(damping)


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
        numbers = isinstance(iterations, int) and isinstance(tol, Real) and isinstance(warm, Real)
        if not numbers or iterations < 1 or not tol >= 0 or not 0 <= warm <= 1:
            raise ArgumentError(
                f"iterations={iterations!r}, tol={tol!r}, warm={warm!r}: use a positive integer, a number that is not "
                "negative, and one in [0, 1]"
            )
        self.iterations, self.tol, self.warm = iterations, tol, warm
        super().__init__(
            model, loss, GGNMP(), params, lr=lr, momentum=momentum, damping=damping, weight_decay=weight_decay, decay=0.0,
            interval=1, options=options,
        )  # fmt: skip
        trial = {**options, "update_buffers": False}
        self._trial: Compiled | None = compile_model(model, loss, [], params=self._of, **trial) if adaptive else None
        self._make_again()

    def _make_again(self) -> None:
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

    Raises:
        NonFiniteError: if a product, or the square of one, is not finite.
    """
    r = {n: b[n] - t for n, t in times(x).items()}
    p, squared, enough = r, _dot(r, r), float(tol**2 * _dot(b, b))
    for _ in range(iterations):
        if not _number(squared, r) > enough:
            break
        ap = times(p)
        curvature = _dot(p, ap)
        if not _number(curvature, ap) > 0:  # by rounding
            break
        step = squared / curvature
        x = {n: t + step * p[n] for n, t in x.items()}
        r = {n: t - step * ap[n] for n, t in r.items()}
        before, squared = squared, _dot(r, r)
        p = {n: t + squared / before * p[n] for n, t in r.items()}
    return x


def _number(total: Tensor, of: Named) -> float:
    """A product as a number, which a comparison would take for small if it were NaN; `of`: what it was made of."""
    found = float(total)
    if not isfinite(found):
        large = (n for n, t in of.items() if not isfinite(float(t.square().sum())))
        raise _non_finite("curvature times the direction", next(large, next(iter(of))))
    return found


def _dot(a: Named, b: Named) -> Tensor:
    return torch.stack([(t * b[n]).sum() for n, t in a.items()]).sum()
