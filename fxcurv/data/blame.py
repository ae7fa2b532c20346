"""Which sample of a batch is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.front.arguments import Arguments, filled
from fxcurv.ir.private import pytree


def bad_sample(model: nn.Module, loss: Any, arguments: Arguments, start: int, batch: int) -> str:
    """Name the first sample of a batch that is not finite, running each by itself through the plain model.

    Args:
        start: the number of the batch's first sample; `batch`: the batch's own.
    """
    tensors = [("input", t, d) for t, d in zip(arguments.inputs, arguments.batch_dims, strict=True)]
    tensors += [("target", t, d) for t, d in zip(arguments.targets, arguments.target_dims(), strict=True)]
    n = arguments.batch_size
    cuda = sorted({t.device.index or 0 for _, t, _ in tensors if t.is_cuda})
    with torch.random.fork_rng(cuda):
        for i in range(n):
            parts = [t if d is None else t.narrow(d, i * (t.shape[d] // n), t.shape[d] // n) for _, t, d in tensors]
            what = _first_bad_part(model, loss, arguments, [kind for kind, *_ in tensors], parts)
            if what:
                return f"sample {start + i} of the data set (number {i} of batch {batch}): its {what} is not finite"
    return f"batch {batch} (samples {start} to {start + n - 1}), though every sample by itself is finite"


def _first_bad_part(model: nn.Module, loss: Any, arguments: Arguments, kinds: list[str], parts: list[Tensor]) -> str:
    for kind, t in zip(kinds, parts, strict=True):
        if not _finite(t):
            return kind
    count = len(arguments.inputs)
    args, kwargs = filled(arguments.input_template, parts[:count])
    with torch.enable_grad():
        output = model(*args, **kwargs)
        if not all(_finite(t) for t in pytree.tree_leaves(output) if isinstance(t, Tensor)):
            return "output"
        if loss is None:
            return ""
        value = loss(output, *filled(arguments.target_template, parts[count:]))
        if not _finite(value):
            return "loss"
        held = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(value, held, allow_unused=True)
    return "" if all(g is None or _finite(g) for g in grads) else "gradient"


def _finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(t.detach().isfinite().all())
