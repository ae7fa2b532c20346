"""How the loss is reduced over samples: a sum, or a mean; and the weight that a batch has in that mean.

The loss itself is evaluated, as a function of the model's output. With a reference A (one sample) beside the batch B,

    dL(A and B)/df_A = r dL(A)/df_A    and    dL(A and B)/df_B = s dL(B)/df_B

where r = s = 1 for a sum, and r = Z_A / (Z_A + Z_B), s = 1 - r for a mean, whatever Z counts: samples, positions that are not
ignored, weights of classes. So Z_B = 1/r - 1, in units of Z_A, to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxcurv.api import Compiled
from fxcurv.data.together import ALONE, Together
from fxcurv.errors import ArgumentError, LossError
from fxcurv.front.arguments import Arguments, filled, templated
from fxcurv.ir.placement import Shard

WAY_OUT = (
    'Way out: reduction="sum" or "mean" (over samples), or a function (inputs, *targets) -> Z, the weight of a batch in the '
    "mean, as its number of tokens."
)
Parts = tuple[list[Tensor], list[Tensor]]  # tensors of the output, of the targets
Dims = tuple[list[int | None], list[int | None]]  # of the samples in them


class Question(NamedTuple):
    """The data for finding the reduction: a batch, where its samples are, their number, and the slopes at any batch."""

    batch: Parts
    dims: Dims
    n: int
    slopes: Callable[[Parts], tuple[list[Tensor | None], bool]]


def _of_loss(method: Callable) -> Callable:
    """Decorate a method that calls the loss on batches of its own making, which may fail."""

    @functools.wraps(method)
    def asked(*args: Any) -> Any:
        try:
            return method(*args)
        except (RuntimeError, IndexError, TypeError) as error:
            raise LossError(f"the loss of two batches together cannot be had: {error}\n{WAY_OUT}") from error

    return asked


class Weights:
    """The weights of batches.

    Args:
        model, loss: what is compiled.
        reduction: what the user says, None to find out.

    Attributes:
        mean: whether the loss is a mean; None before the first batch says so.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] | None, reduction: Any):
        if reduction not in (None, "sum", "mean") and not callable(reduction):
            raise ArgumentError(f"reduction={reduction!r}: pass 'sum', 'mean' or a function (inputs, *targets) -> Z")
        self._model, self._loss, self._reduction = model, loss, reduction
        known = loss is None or reduction is not None
        self.mean: bool | None = loss is not None and reduction != "sum" if known else None
        self._reference: Parts | None = None
        self._wide = True

    def of(
        self, result: Any, inputs: Any, targets: tuple, arguments: Arguments, compiled: Compiled | None = None,
        together: Together = ALONE,
    ) -> float | None:  # fmt: skip
        """The weight of a batch, of which `compiled` gave the result; None where the loss is a sum.

        Args:
            together: the ranks whose batch it is; the result and the arguments are this rank's part.

        Raises:
            LossError: for a loss that is neither a sum nor a mean, or whose reduction cannot be found.
        """
        if self.mean is False:
            return None
        if callable(self._reduction) or self._reduction == "mean":
            return sum(together.values(lambda: self.given(inputs, targets, arguments.batch_size)))
        asked = self._question(result, inputs, targets, arguments, compiled)
        if self._reference is None:  # one for all ranks, because weights are in units of its weight
            found = together.values(lambda: self._find_reference(asked()))
            self._reference = next((one for one in found if one is not None), None)
        if self._reference is None:
            return 0.0  # no sample of the batch counts
        return self._agreed(together.values(lambda: self._compare_with_reference(asked())))

    def given(self, inputs: Any, targets: tuple, n: int) -> float:
        """The weight of a batch of `n` samples by `reduction=`, a function or "mean".

        Raises:
            ArgumentError: if the function gives no weight.
        """
        if not callable(self._reduction) or not n:
            return float(n)
        found = self._reduction(inputs, *targets)
        try:
            z = float(found)
        except (TypeError, ValueError, RuntimeError):
            z = math.nan
        if not 0 <= z < math.inf:
            raise ArgumentError(
                f"reduction= gave {found!r} for a batch: return its weight in the mean, a number that is not negative, such as "
                "the number of its samples or tokens"
            )
        return z

    def _agreed(self, found: list[tuple[bool | None, float]]) -> float | None:
        """The weight of a batch, from (whether the loss is a mean, the weight) of its parts on ranks."""
        known = {mean for mean, _ in found if mean is not None}
        if len(known) > 1:
            raise LossError(f"the loss is a mean of some samples, and a sum of others.\n{WAY_OUT}")
        self.mean = known.pop() if known else None
        return None if self.mean is False else sum(z for _, z in found)

    def total(self, weights: float) -> float | None:
        """The weight of all batches, whose weights add up to `weights`; None where the loss is a sum."""
        if not self.mean:
            return None
        if not weights:
            raise LossError("the mean is over nothing: every sample is ignored")
        return weights

    def _question(
        self, result: Any, inputs: Any, targets: tuple, arguments: Arguments, compiled: Compiled | None
    ) -> Callable[[], Question]:
        @functools.cache
        def asked() -> Question:
            if not hasattr(result, "output"):
                raise ArgumentError(
                    "over() finds by the model's output whether the loss is a mean, and outputs=False keeps none.\n"
                    "Way out: reduction='sum', 'mean' (of all samples alike), or a function (inputs, *targets) -> its divisor"
                )
            outputs: list[Tensor] = []
            template = templated(result.output, outputs)
            dims = _sample_dims(outputs, inputs, targets, arguments, compiled) if arguments.batch_size else ([], [])

            def slopes(parts: Parts) -> tuple[list[Tensor | None], bool]:
                def loss(outs: list[Tensor], goals: list[Tensor]) -> Any:
                    return self._loss(filled(template, outs), *filled(arguments.target_template, goals))  # type: ignore[misc]

                return self._slopes(parts, loss)

            batch = [t.detach() for t in outputs], list(arguments.targets)
            return Question(batch, dims, arguments.batch_size, slopes)

        return asked

    @_of_loss
    def _compare_with_reference(self, question: Question) -> tuple[bool | None, float]:
        """(whether the loss is a mean, None if this batch does not show it; the weight of the batch)."""
        batch, dims, slopes = question.batch, question.dims, question.slopes
        if not question.n:
            return self.mean, 0.0
        one: Parts = tuple([t.to(batch[0][0].device) for t in ts] for ts in self._reference or ())  # type: ignore[assignment]

        _check_sizes(one, batch, dims)

        def beside(batch: Parts) -> Any:
            """The reference and a batch in one."""
            join = lambda a, t, d: t if d is None else torch.cat([a.to(t), t], d)  # noqa: E731
            return tuple(list(map(join, *parts)) for parts in zip(one, batch, dims, strict=True))

        of_one, of_batch, (of_both, regular) = slopes(one)[0], slopes(batch)[0], slopes(beside(batch))
        if self.mean is None and not _sloping(of_batch):  # a perfect fit, say
            batch = _with_other_outputs(batch)
            of_batch, (of_both, regular) = slopes(batch)[0], slopes(beside(batch))
        if any(g is not None and d is None for g, d in zip(of_both, dims[0], strict=True)):
            raise LossError(
                f"the loss reads an output that has no samples (it is computed in the model, perhaps).\n{WAY_OUT}"
            )
        sizes = [a.shape[d] if d is not None else 0 for a, d in zip(one[0], dims[0], strict=True)]
        known = [(g, d, k) for g, d, k in zip(of_both, dims[0], sizes, strict=True) if g is not None]
        r = _ratio([g.narrow(d, 0, k) for g, d, k in known], of_one)
        s = _ratio([g.narrow(d, k, g.shape[d] - k) for g, d, k in known], of_batch)
        return self._weight(r, s, regular)

    def _weight(self, r: float | None, s: float | None, regular: bool) -> tuple[bool | None, float]:
        """The result of `_compare_with_reference` from r and s; s is None where the batch has no slope."""
        near = 1e-6 if self._wide else 1e-2
        if r is None:
            raise LossError(
                f"the loss has no derivative in the model's output, so it does not say how it is reduced.\n{WAY_OUT}"
            )
        if self.mean is None and s is not None and abs(r - 1) < near and abs(s - 1) < near:
            if regular:
                raise LossError(
                    "the loss is a sum over samples and a term that reads parameters, which every batch would count anew. "
                    "Way out: a mean over samples; or leave that term out, and add its own gradient and curvature."
                )
            return False, 0.0
        if self.mean is None and s is None:
            return None, 0.0  # no sample of the batch counts, so it does not show whether the loss is a mean
        if not 0 < r < 1 + near or s is not None and abs(r + s - 1) > near:
            raise LossError(
                f"the loss is neither a sum nor a mean over samples, so batches do not add up to it.\n{WAY_OUT}"
            )
        z = 1 / r - 1
        return True, z if z > 1e-12 else 0.0

    @_of_loss
    def _find_reference(self, question: Question) -> Parts | None:
        """A sample of the batch at which the loss has a slope, with other outputs if it has none at these."""
        batch, dims, n, slopes = question.batch, question.dims, question.n, question.slopes
        for parts in (batch, _with_other_outputs(batch)):
            for i in range(n):
                cut = lambda t, d, i=i: t if d is None else t.narrow(d, i * (t.shape[d] // n), t.shape[d] // n).clone()  # noqa: E731
                one: Any = tuple(list(map(cut, *both)) for both in zip(parts, dims, strict=True))
                if _sloping(slopes(one)[0]):
                    return one
        return None

    def _slopes(self, parts: Parts, loss: Callable) -> tuple[list[Tensor | None], bool]:
        """(the derivative in each tensor of the output, whether the loss reads parameters beside it), in float64 if it can."""
        for wide in (True, False) if self._wide else (False,):
            outs, goals = ([t.double() if wide and t.is_floating_point() else t for t in ts] for ts in parts)
            leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in outs]
            held = [
                p
                for m in (self._model, self._loss)
                if isinstance(m, nn.Module)
                for p in m.parameters()
                if p.requires_grad
            ]
            try:
                with torch.enable_grad():
                    value = loss(leaves, goals)
                if not value.requires_grad:
                    return [None] * len(leaves), False
                wanted = [t for t in leaves if t.requires_grad]
                found = torch.autograd.grad(value, [*wanted, *held], allow_unused=True)
            except (RuntimeError, TypeError):
                if not wide:
                    raise
                self._wide = False  # the loss has weights in another dtype
                continue
            given = iter(found)
            slopes = [next(given) if t.requires_grad else None for t in leaves]
            return slopes, any(g is not None and bool(g.any()) for g in given)
        raise AssertionError

    def state_dict(self) -> dict[str, Any]:
        """The state, in tensors and plain values."""
        reference = None if self._reference is None else [list(part) for part in self._reference]
        return {"mean": self.mean, "reference": reference, "wide": self._wide}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self._wide = state["mean"], state["wide"]
        self._reference = None if state["reference"] is None else tuple(state["reference"])  # type: ignore[assignment]


def _check_sizes(one: Parts, batch: Parts, dims: Dims) -> None:
    """Refuse a batch beside which a sample of another one cannot stand: sequences padded to another length, say."""
    for a, t, d in zip((*one[0], *one[1]), (*batch[0], *batch[1]), (*dims[0], *dims[1]), strict=True):
        known, own = ([size for k, size in enumerate(x.shape) if k != d] for x in (a, t))
        if d is not None and known != own:
            raise LossError(
                f"samples of a batch have the sizes {own}, and {known} in an earlier one (each is padded to its own longest "
                "sequence, perhaps), so the loss cannot be asked of samples of both, which says how it is reduced.\nWay out: "
                "reduction= a function (inputs, *targets) -> Z, what the mean of a batch divides by: for a mean over tokens the "
                'number of those that count; "mean" for a mean over samples, "sum" for a sum, and for nothing else; or pad all '
                "batches to one length."
            )


def _sloping(slopes: Sequence[Tensor | None]) -> bool:
    """Whether there is a derivative that is not zero, and all are finite."""
    known = [g for g in slopes if g is not None]
    return any(bool(g.any()) for g in known) and all(bool(g.isfinite().all()) for g in known)


def _with_other_outputs(batch: Parts) -> Parts:
    """The same targets beside other outputs."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else 0 for t in batch[0]]
    return [t + e for t, e in zip(batch[0], noise, strict=True)], batch[1]


def _sample_dims(
    outputs: list[Tensor], inputs: Any, targets: tuple, arguments: Arguments, compiled: Compiled | None
) -> Dims:
    """The dimension of the samples, or of all their positions, in the model's outputs and in the targets.

    Found by sizes, or from the program where several dimensions have the samples' size.
    """
    n, first = arguments.batch_size, [d for d in arguments.batch_dims if d is not None]
    values = [*outputs, *arguments.targets]
    equal = [[d for d, size in enumerate(t.shape) if size == n] for t in values]
    dims = [*(_samples_at(t, n, first) for t in outputs), *arguments.target_dims()]
    if compiled is not None and any(len(at) > 1 for at in equal):
        program = compiled.program_of(inputs, *targets)
        held = zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=False)
        of_targets = {bound.index: node for bound, node in held if bound.kind == "target"}
        nodes = [*program.output_leaves, *(of_targets.get(k) for k in range(len(arguments.targets)))]
        places = [node.meta.get("place") if node is not None else None for node in nodes]
        known = zip(places, equal, dims, strict=True)
        dims = [p.dim if isinstance(p, Shard) and len(at) > 1 and p.dim in at else d for p, at, d in known]
    return dims[: len(outputs)], dims[len(outputs) :]


def _samples_at(t: Tensor, n: int, first: Sequence[int]) -> int | None:
    """The dimension of an output's samples, or of all their positions, by its sizes."""
    order = list(dict.fromkeys([*(d for d in first if d < t.ndim), *range(t.ndim)]))
    equal = [d for d in order if t.shape[d] == n]
    return next(iter([*equal, *(d for d in order if t.shape[d] and t.shape[d] % n == 0)]), None)


def _ratio(got: Sequence[Tensor], of: Sequence[Tensor | None]) -> float | None:
    """r with got = r of; None if `of` is zero.

    Raises:
        LossError: if there is none.
    """
    own = [t for t in of if t is not None]
    if not own or not any(bool(t.any()) for t in own):
        return None
    a, b = (torch.cat([t.double().flatten() for t in ts]) for ts in (got, own))
    b = b / b.norm()
    size = torch.cat([t.double().flatten() for t in own]).norm()
    r = a @ b
    if float((a - r * b).norm()) > (1e-6 if own[0].dtype == torch.float64 else 1e-2) * float(r.abs()):
        raise LossError(
            f"the loss is not a sum over samples: other samples change the direction of a sample's slope.\n{WAY_OUT}"
        )
    return float(r / size)
