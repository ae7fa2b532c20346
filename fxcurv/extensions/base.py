"""What an extension is, and how it sees a parameter."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxcurv.contractions.contract import Contract, Spec
from fxcurv.contractions.factors import Explicit, Factor, declare_factor, materialised
from fxcurv.contractions.pairs import squares_of
from fxcurv.errors import ExtensionError
from fxcurv.extensions.parameters import hashable
from fxcurv.ir.emit import call, declare, emit
from fxcurv.ir.placement import Shard, samples_first
from fxcurv.ir.precision import HALF, wide, widened
from fxcurv.ir.program import Program
from fxcurv.ir.traced import sum_of
from fxcurv.quantity import GRADIENT, KINDS, Gradient, Group
from fxcurv.walks.groups import groups_of
from fxcurv.walks.uses import Use, pull_back, select_group


@dataclass(frozen=True)
class Combine:
    """How the values of several batches combine to that of all their samples (`fxcurv.over`).

    Attributes:
        how: "sum" over samples, "mean" over samples, or "rows", one per sample along `Extension.sample_axis`.
        degree: the value for c times the loss is c**degree times that for the loss; None if there is no such power.
    """

    how: str
    degree: float | None = 1


# yields extensions to sum over the batches, is sent their totals, and returns the value
Steps = Generator[tuple["Extension", ...], list[Any], dict[str, Any]]


@dataclass(frozen=True)
class Extension:
    """A quantity that a user asks for. Equal extensions (same class, same arguments) share everything.

    Subclasses are frozen dataclasses that set `savefield = "name"` and `requires`, and define `extract`.

    Attributes:
        savefield: the field of the result; every instance may choose another.
        params: the parameters of the quantity, all if not given: a name, a prefix ("encoder.layer.1") or a
            pattern ("head.*"), a list of these, or a predicate (name, parameter) -> bool, called once per program (reuse one
            function object: a new one counts as a new extension). Frozen parameters are never among them. Its columns go down to
            these parameters only; the gradient stays whole. If two extensions set the same extra result
            (`sample_norms`, `ggn`, `hessian`) over different parameters, the later one's is `<name>_<savefield>`.
        requires: the columns it needs.
        per_sample: whether it needs samples that do not interact.
        whole_batch: whether it is defined where samples interact, with the batch as one sample.
        needs_convex: whether it needs a loss that is convex in the model's output.
        any_sample: whether the result is the same for sequences as samples and for tokens as samples.
        shows_columns: whether the result depends on which root of the loss Hessian the columns are.
        by_op: whether the result depends on which ops the model is written in, so that none may be rewritten in others.
        sample_axis: the axis of the result that holds the samples, None if there is one result for all of them.
        leaves_out: whether the result may leave out some of the parameters.
        pairs: whether it is about pairs of samples, for which `mesh=` sends the factors of P.
        reads_gradients: whether it reads individual gradients beside the columns of `requires`.
        holds_samples: whether the result is a sum over columns for every sample, which each part of the columns would
            write anew.
        combine: how each tensor of a parameter's value combines over batches; () where it does not.
        extras: the same for the extra results, by field.
        data_passes: how often `gather` goes over the batches.
    """

    savefield: str = field(default="", kw_only=True)
    params: Any = field(default=None, kw_only=True)
    requires: ClassVar[Any] = Gradient()
    per_sample: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = False
    needs_convex: ClassVar[bool] = False
    any_sample: ClassVar[bool] = False
    shows_columns: ClassVar[Any] = False
    pairs: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False
    holds_samples: ClassVar[bool] = False
    leaves_out: ClassVar[Any] = False
    by_op: ClassVar[bool] = False
    sample_axis: ClassVar[int | None] = None
    combine: ClassVar[tuple[Combine, ...]] = ()
    extras: ClassVar[Any] = {}
    data_passes: ClassVar[int] = 1

    def __post_init__(self):
        if not self.savefield:
            object.__setattr__(self, "savefield", type(self).savefield)
        object.__setattr__(self, "params", hashable(self.params, ExtensionError, type(self).__name__))
        self.check()

    def check(self) -> None:
        """Validate the arguments; raise `ExtensionError`."""

    def gather(self) -> Steps:
        """Compute the value of a data set: yield what to sum over its batches, receive these totals, return the value.

        Every `yield` is a pass over the data.

        Raises:
            ExtensionError: if the value of all samples does not follow from those of batches.
        """
        name = type(self).__name__
        if not self.combine:
            raise ExtensionError(
                f"{name} of a data set is not made of that of its batches. Way out: one call on all samples, or an extension "
                "that sums over samples."
            )
        if getattr(self, "subsampling", None) is not None:
            raise ExtensionError(
                f"{name}(subsampling=...) counts the samples of every batch anew: drop it, and index the result"
            )
        (total,) = yield (self,)
        return total

    def field_of(self, part: str) -> str:
        """The field of a part of this quantity."""
        return f"{self.savefield}_{part}"

    def extract(self, param: Param) -> Any:
        """The quantity of one parameter, as a node or a pytree of nodes."""
        raise NotImplementedError

    def extract_all(self, params: list[Param]) -> tuple[dict[str, Any], dict[str, fx.Node]]:
        """(the quantity of each of `params` by name, extra results by field)."""
        return {p.name: self.extract(p) for p in params}, {}


class Param:
    """A trainable parameter as an extension sees it: its per-sample cotangents P, to be contracted."""

    def __init__(self, program: Program, name: str, extension: Extension | None):
        self.program, self.name, self.extension = program, name, extension
        self.node = program.params[name]
        self.label = type(extension).__name__ if extension is not None else "gradient"

    def contract(
        self, power: int = 1, reduce: str = "", samples=None, weights: fx.Node | None = None, groups=None, precise=None
    ) -> fx.Node:
        """Sum over the axes in `reduce` of weights * P**power, P[v, n, *param].

        Args:
            reduce: letters "v" (columns), "n" (samples), "p" (the parameter's axes); the result keeps the others, in order.
            samples: indices of the samples to keep (None: all).
            weights: a node whose value broadcasts to [V, N].
            precise: whether half precision is accumulated and returned in float32 (default: for squares only).

        Where a sample is a token, N is two axes, [N, T].
        """
        precise = power == 2 if precise is None else precise
        weights = self.no_wider(weights) if weights is not None else None
        if groups is None and self.positions is not None:
            return self._by_token(power, reduce, samples, weights, precise)
        spec = Spec(power, reduce, tuple(samples) if samples is not None else None)
        if groups is None:
            groups = groups_of(self.program, self.extension.requires) if self.extension else [GRADIENT]
        reached = [g for g in groups if any(g in u.groups for u in self.program.walked.uses[self.name])]
        groups = reached if "v" in spec.reduce and reached else groups
        parts = [self._of_group(spec, g, weights, precise) for g in groups]
        if len(parts) == 1:
            return parts[0]
        return self.emit(sum_of if "v" in reduce else _concatenated, parts)

    def no_wider(self, weights: fx.Node) -> fx.Node:
        """Weights in at most the dtype that this parameter's P is summed in; parameters may have several."""
        dtype, own = wide(self.node.meta["val"].dtype), weights.meta["val"].dtype
        return weights if torch.promote_types(dtype, own) == dtype else self.emit(Tensor.to, weights, dtype)

    @property
    def positions(self) -> int | None:
        """The number T of positions if the samples of this quantity are tokens, N T of them; else None."""
        tokens = self.extension is not None and self.extension.requires.of_gradients
        return self.program.analysis.positions[0] if tokens and self.program.analysis.positions is not None else None

    def _by_token(self, power: int, reduce: str, samples, weights: fx.Node | None, precise: bool) -> fx.Node:
        """`contract` for P[n, t, *param], which column t of the walk gives at sample n."""
        rows = self.program.analysis.rows
        if samples is not None and not rows:
            raise ExtensionError(f'{self.label}(subsampling=...) with sample="token": index the result instead')
        spec = Spec(power, ("vn" if "n" in reduce else "") + ("p" if "p" in reduce else ""))
        parts, start = [], 0
        for group in groups_of(self.program, Gradient()):
            stop = start + self.program.walked.columns[group]
            own = self.emit(_weights_of_columns, weights, start, stop, rows) if weights is not None else None
            parts.append(self._of_group(spec, group, own, precise))
            start = stop
        value = parts[0] if len(parts) == 1 else self.emit(sum_of if "n" in reduce else _concatenated, parts)
        if rows:
            return self.emit(_sample_rows, value, tuple(samples or ()), "n" in reduce, "v" in reduce)
        return self.emit(_sample_axes, value, "n" in reduce, "v" in reduce)

    def emit(self, fn, *args):
        """Emit `fn(*args)` in the name of the extension."""
        return emit(self.program, fn, *args, origin=self.origin())

    def origin(self) -> dict:
        """Provenance of nodes that belong to this parameter's quantity."""
        field = self.extension.savefield if self.extension is not None else "grad"
        known = {"stage": "extract", "extension": self.label, "savefield": field, "param": self.name}
        return {**known, "op": self.label, "module": self.name}

    def _of_group(self, spec: Spec, group: Group, weights: fx.Node | None, precise: bool) -> fx.Node:
        uses = [u for u in self.program.walked.uses[self.name] if group in u.groups]
        if not uses:
            self._check_wanted(group)
            return self._zeros(spec, group, precise)
        if group in self.program.walked.weights:
            weights = self.program.walked.weights[group]
        factors = [select_group(self.program, u, group, self.origin()) for u in uses]
        if precise:
            factors = [f if f.g.meta["val"].dtype not in HALF else self.emit(widened, f) for f in factors]
        path = uses[0].path
        if any(u.path != path for u in uses):
            factors = [self._at_parameter(f, u) for f, u in zip(factors, uses, strict=True)]
            path = ()
        if group.paired:
            given = factors
            factors, weights = self.emit(squares_of, given)
            for factor in factors:
                declare_factor(factor, given)
        value = self._contract(spec, factors, weights, uses[0].rule)
        if "p" in spec.reduce or not path:
            return value
        return pull_back(self.program, Use(factors[0], (), (), "", path), value, spec.reduce)

    def _check_wanted(self, group: Group) -> None:
        """Columns that nobody asked for have no uses, which is no reason for zeros."""
        if self.extension is not None and self.name not in self.program.walked.wanted.get(replace(group, part=0), ()):
            raise ExtensionError(
                f"{self.label} contracts columns of kind '{group.kind}' for '{self.name}', and did not ask for them. Way out: "
                "name them in its `requires`; individual gradients beside other columns by `reads_gradients = True`."
            )

    def _at_parameter(self, factor: Factor, use: Use) -> Explicit:
        """P at the parameter itself, materialised, where uses of different kinds meet."""
        p = self.emit(materialised, factor)
        declare(p, Shard(1), factor)
        return Explicit(pull_back(self.program, use, p, ""))

    def contract_factors(self, spec: Spec, factors: list[Factor], rule: str) -> fx.Node:
        """The reduction `spec` of the P that `factors` make, for this parameter in another form (a rotated one)."""
        return self._contract(spec, factors, None, rule)

    def _contract(self, spec: Spec, factors: list[Factor], weights: fx.Node | None, rule: str) -> fx.Node:
        target, args = Contract.of(spec, factors, weights)
        return call(self.program, target, *args, origin={**self.origin(), "rule": rule})

    def _zeros(self, spec: Spec, group: Group, precise: bool) -> fx.Node:
        """Zeros, for a parameter that the loss does not reach."""
        columns = self.columns(group)
        head = self.program.heads[0]
        dtype = self.node.meta["val"].dtype
        return self.emit(_zeros, spec, columns, self.node, head, head.meta["place"], wide(dtype) if precise else dtype)

    def columns(self, group: Group) -> int:
        """The number of columns of a group: without curvature in the loss, that of the output's entries per sample."""
        if not KINDS[group.kind].carried:
            return group.draws or sum(self.program.batch.columns(h.meta["val"]) for h in self.program.heads)
        return self.program.walked.columns.get(group, 1)


def _concatenated(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def _weights_of_columns(weights: Tensor, start: int, stop: int, rows: bool) -> Tensor:
    """[1, N, T], or [1, T] where the batch is one sample -> the weights of columns t from `start` to `stop`, [V, N]."""
    return weights[:, start:stop].t() if rows else weights[0, :, start:stop].t()


def _sample_rows(value: Tensor, samples: tuple[int, ...], summed: bool, one_column: bool) -> Tensor:
    """[T, 1, ...] -> [T, ...], all rows or some, unless `summed`; in front an axis of columns, unless `one_column`."""
    value = value if summed else value.squeeze(1)
    value = value[list(samples)] if samples else value
    return value if one_column else value.unsqueeze(0)


def _sample_axes(value: Tensor, summed: bool, one_column: bool) -> Tensor:
    """[T, N, ...] -> [N, T, ...], unless `summed`; in front an axis of columns, unless `one_column`."""
    value = value if summed else value.movedim(0, 1)
    return value if one_column else value.unsqueeze(0)


def _zeros(spec: Spec, columns: int, param: Tensor, head: Tensor, place, dtype: torch.dtype) -> Tensor:
    def size(axis: str) -> Any:
        if axis == "v":
            return columns
        return samples_first(head, place).shape[0] if spec.samples is None else len(spec.samples)

    lead = [size(axis) for axis in "vn" if axis not in spec.reduce]
    return param.new_zeros((*lead, *(() if "p" in spec.reduce else param.shape)), dtype=dtype)
