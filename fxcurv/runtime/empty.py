"""A batch without samples: loss, output and gradient are PyTorch's own, all else is zeros in the shapes of a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import Arguments, filled
from fxcurv.front.requests import Request, Subject
from fxcurv.ir.origin import failing_line
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program
from fxcurv.kronecker import Eigenbasis
from fxcurv.result import Result
from fxcurv.runtime.lengths import lengths_of


def of_no_sample(program: Program, request: Request, values: dict[str, Tensor]) -> Result:
    """The result for an empty batch: sample axes are of length 0, sums over samples zero, eigenvectors unit vectors.

    Args:
        program: the one for samples of the same kind.
        values: in place of the parameters.

    Raises:
        ArgumentError: for products, `create_graph`, a regulariser whose curvature is requested, or where plain PyTorch
            refuses the batch.
    """
    if program.borrowing or request.create_graph:
        what = "products" if program.borrowing else "create_graph=True"
        raise ArgumentError(f"the batch is empty, which {what} cannot be of: pass at least one sample")
    subject, arguments = request.subject, request.arguments
    model = subject.model
    args, kwargs = filled(arguments.input_template, arguments.inputs)
    held = {**dict(subject.named_parameters()), **{name: t.detach().requires_grad_() for name, t in values.items()}}
    with torch.enable_grad(), request.as_called():
        output = _run(model, {n: held[n] for n in values if not _is_of_loss(subject, n)}, args, kwargs)
        ends = {n.removeprefix("loss."): held[n] for n in values if _is_of_loss(subject, n)}
        targets = filled(arguments.target_template, arguments.targets)
        loss = _run(subject.loss, ends, (output, *targets), {}) if subject.loss else None
    fields: dict[str, Any] = {}
    results = dict(program.results)
    if loss is not None:
        wanted = [held[name] for name in results["grad"]]
        found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
        grads = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(wanted, found, strict=True)]
        asked = [type(e).__name__ for e in program.extensions if e.requires.of_ops]
        if asked and any(bool(g.any()) for g in grads):
            raise ArgumentError(
                f"the batch is empty, and the loss has a regulariser, whose curvature {', '.join(asked)} would be: pass at least "
                "one sample"
            )
        fields = {"loss": loss.detach(), "grad": dict(zip(results.pop("grad"), grads, strict=True))}
    fields["output"] = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output)
    fields |= zeros_of(program, arguments)
    if not program.options.update_buffers:
        buffers = dict(model.named_buffers(remove_duplicate=False))
        fields["buffers"] = {name: buffers[name].clone() for name in program.mutations}
    return Result(fields, program.extensions, subject.holder)


def zeros_of(program: Program, arguments: Arguments) -> dict[str, Any]:
    """field -> parameter name -> value of every extension for an empty batch; fields of all parameters together as they are."""
    lengths = lengths_of(program, arguments)
    axes = {e.savefield: None if getattr(e, "subsampling", None) else e.sample_axis for e in program.extensions}
    fields: dict[str, Any] = {
        field: {name: _empty_value(program, value, axes[field], lengths) for name, value in nodes.items()}
        for field, nodes in program.results.items()
        if field != "grad"
    }
    return fields | {field: _empty_value(program, node, 0, lengths) for field, node in program.extras.items()}


def _is_of_loss(subject: Subject, name: str) -> bool:
    return subject.loss_params and name not in dict(subject.model.named_parameters())


def _run(function: Any, values: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    try:
        return torch.func.functional_call(function, values, args, kwargs) if values else function(*args, **kwargs)
    except (RuntimeError, IndexError) as error:
        raise ArgumentError(
            f"the batch is empty, and plain PyTorch refuses it\n{failing_line(error)}({str(error).splitlines()[0]}).\n"
            "Way out: pass at least one sample, or say all sizes, as in flatten(1) or view(n, 4, k) for reshape(n, -1, k)."
        ) from error


def _empty_value(program: Program, value: Any, axis: int | None, lengths: tuple[int, ...]) -> Any:
    """Zeros in the shapes of the nodes in `value`, with a sample axis of length 0."""

    def zeros(node: fx.Node) -> Tensor:
        val = node.meta["val"]
        if program.batch.symbols:
            return torch.zeros(
                [program.batch.evaluate(s, 0, lengths) for s in val.shape], dtype=val.dtype, device=val.device
            )
        shape = list(val.shape)
        if axis is not None:
            shape[axis] = 0
        return torch.zeros(shape, dtype=val.dtype, device=val.device)

    found = pytree.tree_map(zeros, value)
    if isinstance(found, Eigenbasis):
        bases = [torch.ones_like(q) if q.ndim == 1 else torch.eye(len(q)).to(q) for q in found[:-1]]
        return Eigenbasis([*bases, found[-1]], found.arrangement)
    return found
