"""The batches of a loader: inputs and targets, and marks that tell one batch from another."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxcurv.api import Compiled
from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import map_leaves
from fxcurv.ir.private import pytree


def unpacked(compiled: Compiled, batch: Any, unpack: Callable[[Any], tuple] | None) -> tuple[Any, tuple]:
    """(inputs, targets) of a batch, on the model's device.

    Raises:
        ArgumentError: for a batch of another form.
    """
    alone = compiled.loss is None
    if unpack is not None:
        given: Any = unpack(batch)
    elif isinstance(batch, tuple | list) and len(batch) >= 1 + (not alone):
        given = batch
    elif alone and isinstance(batch, Tensor):
        given = (batch,)
    else:
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, dict) else ""
        raise ArgumentError(
            f"the loader yields a {type(batch).__name__}{keys}, not (inputs, targets): pass "
            "unpack=lambda batch: (inputs, targets), where inputs are a tensor, or a tuple or dict of them"
        )
    if not isinstance(given, tuple | list) or not given:
        raise ArgumentError(f"unpack= gave a {type(given).__name__}: return (inputs, *targets)")
    device = next(compiled.model.parameters()).device
    inputs, *targets = map_leaves(tuple(given), Tensor, lambda t: t.to(device))
    return inputs, () if alone and unpack is None else tuple(targets)


def mark(batch: Any) -> int:
    """A checksum that tells one batch from another: of shapes, and of the first and last numbers."""
    found = 0
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1)
            ends = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous().view(torch.uint8).numpy().tobytes()
            found = zlib.crc32(str(tuple(leaf.shape)).encode() + ends, found)
    return found
