"""tokens: check that every position of the model's output can be a sample of its own, `compile(sample="token")`.

It can if the loss is a sum over positions as well as over samples. Beyond the output, positions are tracked by the same
algebra as samples (`placement`), one axis of positions at a time. A function that is such a sum along each of several
axes is one over all of them together, because its mixed differences vanish.

Under `sample_index=` the batch is one sample whose positions are the rows of the output; a row is what the user calls a
sample. A row's individual gradient is that of its term of the loss, whatever inputs the term depends on.
"""

from __future__ import annotations

from math import prod

from torch import Tensor, fx

from fxcurv.errors import ExtensionError, LossError
from fxcurv.ir import placement
from fxcurv.ir.graph import ancestors, canonical_args, descendants
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Placement, Shard, Site
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program, is_active, is_sharded
from fxcurv.rules.base import rule_of
from fxcurv.rules.sites import numeric_args
from fxcurv.rules.traits import Slice, pointwise, sliced

# value -> (placement of the slices along one axis of the output, which of these slices it has)
Known = dict[fx.Node, tuple[Placement, range]]
WAY_OUT = 'Way out: sample="sequence"; or a loss that is a sum or mean of one term per position.'


def tokens(program: Program) -> Program:
    """Set `analysis.positions`, (number of positions, axis of classes or None), if gradients by token are wanted."""
    if program.options.sample == "token" or program.options.sample_index is not None:
        _find_samples(program)
    return program


def _find_samples(program: Program) -> None:
    merged = program.options.sample_index is not None
    how, other = (
        ("with sample_index=", "samples along a dimension") if merged else ('for sample="token"', 'sample="sequence"')
    )
    for e in program.extensions:
        same = e.any_sample and not (merged and e.sample_axis is not None)
        if not e.requires.of_gradients and not same:
            raise ExtensionError(
                f"{type(e).__name__} is not defined {how}. Way out: {other}, or a quantity of individual "
                "gradients, or one that is a sum over samples (DiagGGNExact, DiagGGNMC, DiagHessian, products)."
            )
    asked = ", ".join(type(e).__name__ for e in program.extensions if e.requires.of_gradients)
    if not asked:
        return
    unit = "row" if merged else "token"
    if len(program.heads) != 1:
        raise LossError(
            f"{asked} per {unit} needs one output that the loss reads, not {len(program.heads)}.\n{WAY_OUT}"
        )
    (head,) = program.heads
    _check_parameters(program, head, asked)
    if merged:
        _find_rows(program, head, asked)
    else:
        _find_positions(program, head, asked)


def _find_rows(program: Program, head: fx.Node, asked: str) -> None:
    """Check that the rows of the output can be samples, and set `analysis.positions`."""
    shape, n = program.batch.shape(head.meta["val"], program.batch.size), program.batch.size
    if not shape or shape[0] != n:
        raise LossError(
            f"{locate(head)}\nis the model's output, {list(shape)}, and the targets are of {n} samples, so {asked} does not "
            "exist. Way out: an output with one row per sample, and targets with as many."
        )
    node, _ = _first_mixing(program, head, Shard(0), n)
    if node is not None:
        raise LossError(
            f"{locate(node)}\njoins rows of the model's output other than in a sum, or is not known to keep them apart, so "
            f"{asked} does not exist.\nWay out: a loss that is a sum or mean of one term per row."
        )
    program.analysis.positions, program.analysis.rows = (n, None), True


def _find_positions(program: Program, head: fx.Node, asked: str) -> None:
    axes = _axes(program, head)
    found = [(dim, *_first_mixing(program, head, at, size)) for dim, at, size in axes]
    others = [d for d in range(head.meta["val"].ndim) if d != head.meta["place"].dim]
    classes = next((dim for dim, _, over_classes in found if over_classes), others[-1] if others else None)
    joining = [node for dim, node, _ in found if node is not None and dim != classes]
    if joining:
        raise LossError(
            f"{locate(joining[0])}\njoins positions of the model's output other than in a sum, or is not known to keep them "
            f"apart, so {asked} per token does not exist.\n{WAY_OUT}"
        )
    count = prod(size for dim, _, size in axes if dim != classes)
    if count == 1 and not set(others) - {classes}:
        shape = list(program.batch.shape(head.meta["val"], program.batch.size))
        raise LossError(
            f"{asked} per token: the model's output {shape} has no axis of positions beside samples and classes (with one number "
            f"per position, the last axis is 1). {WAY_OUT}"
        )
    program.analysis.positions = count, classes


def _check_parameters(program: Program, head: fx.Node, asked: str) -> None:
    """Refuse a loss in which a parameter meets the output: part of its gradient would not pass through the output."""
    past = descendants([head]) - {head}
    for node in ancestors([program.loss]):
        others = [i for i in node.all_input_nodes if node in past and is_active(i) and i not in past and i is not head]
        if others and (is_sharded(node) or any(is_active(a) and is_sharded(a) for a in ancestors(others))):
            raise LossError(
                f"{locate(node)}\nmakes the loss read more of the model than its output, so {asked} per token is not known "
                f"at the output.\n{WAY_OUT}"
            )


def _axes(program: Program, head: fx.Node) -> list[tuple[int, Shard, int]]:
    """(dimension, placement, size) of every axis of f besides the samples', whose dimension two of them may share."""
    where, shape, n = head.meta["place"], program.batch.shape(head.meta["val"]), program.batch.stand_in
    out = []
    for dim, size in enumerate(shape):
        if dim != where.dim:
            out.append((dim, Shard(dim), size))
            continue
        if where.outer > 1:
            out.append((dim, Shard(dim, 1, n * where.inner), where.outer))
        if where.inner > 1:
            out.append((dim, Shard(dim, where.outer * n, 1), where.inner))
    return [axis for axis in out if axis[2] > 1]


def _first_mixing(program: Program, head: fx.Node, at: Shard, size: int) -> tuple[fx.Node | None, bool]:
    """(the first op between output and loss that joins slices other than in a sum, whether as its classes)."""
    known: Known = {head: (at, range(size))}
    past = descendants([head])
    for node in ancestors([program.loss]):
        if node in past and node is not head:
            known[node] = _place_output(program, node, known)
            if known[node][0] == MIXED:
                return node, _takes_as_classes(program, node, known)
    return None if known[program.loss][0] == PARTIAL else program.loss, False


def _takes_as_classes(program: Program, node: fx.Node, known: Known) -> bool:
    """Whether an op is a cross-entropy, and the slices are its classes."""
    rule, prediction = rule_of(node.target, program.rules), node.args[0]
    if not rule.is_loss or prediction not in known:
        return False
    where = known[prediction][0]
    return isinstance(where, Shard) and where.dim == rule.class_axis(prediction.meta["val"].ndim)


def _place_output(program: Program, node: fx.Node, known: Known) -> tuple[Placement, range]:
    """(placement of the slices on an op's output, which of them it has)."""
    given = [known[i] for i in node.all_input_nodes if i in known]
    which = {of for where, of in given if isinstance(where, Shard)}
    val, (first, of) = node.meta["val"], given[0]
    if len(which) > 1 or not isinstance(val, Tensor):
        return MIXED, of  # different slices meet, shifted ones for instance
    of = next(iter(which), of)
    args, shape = numeric_args(program, node, program.batch.stand_in), program.batch.shape(val)
    if sliced(node) and first == Shard((cut := Slice(*args)).dim % val.ndim):
        return first, of[slice(cut.start, cut.end, cut.step)]  # fewer slices, still apart
    sites: list[Site | None] = []
    for leaf in pytree.tree_leaves(canonical_args(node)):
        value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
        here = known[leaf][0] if leaf in known else REPLICATE
        sites.append(Site(program.batch.shape(value), here, leaf in known) if isinstance(value, Tensor) else None)
    found = rule_of(node.target, program.rules).place(sites, args, shape, len(of))
    if found is None and pointwise(node.target):
        found = placement.pointwise([s for s in sites if s], val.ndim, linear=False)
    return found if isinstance(found, Shard) or found == PARTIAL else MIXED, of
