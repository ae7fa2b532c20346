"""The sites of an op's arguments, from which placement rules work, and placements of constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import canonical_args
from fxcurv.ir.placement import REPLICATE, Placement, Shard, Site
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program


def structural(program: Program, val: Any) -> Placement:
    """The placement of a constant, from its shape alone."""
    if not isinstance(val, Tensor):
        return REPLICATE
    n = program.batch.stand_in
    dims = [d for d, s in enumerate(program.batch.shape(val)) if s == n]
    if dims:
        return Shard(dims[0])
    merged = [d for d, s in enumerate(program.batch.shape(val)) if s and s % n == 0]
    return Shard(merged[0], 1, program.batch.shape(val)[merged[0]] // n) if merged and n > 1 else REPLICATE


def sites(program: Program, node: fx.Node) -> list[Site | None]:
    """The sites of the flattened canonical arguments: None for an argument that is no tensor."""
    out: list[Site | None] = []
    for leaf in pytree.tree_leaves(canonical_args(node)):
        val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
        if isinstance(val, Tensor):
            out.append(Site(program.batch.shape(val), leaf.meta["place"], leaf.meta["active"]))
        else:
            out.append(None)
    return out


def numeric_args(program: Program, node: fx.Node, n: int) -> tuple:
    """The canonical arguments, sizes as numbers at batch size `n`; tensors stay nodes."""

    def number(leaf):
        val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
        return program.batch.evaluate(val, n) if isinstance(val, torch.SymInt | int) else leaf

    return pytree.tree_map(number, canonical_args(node))
