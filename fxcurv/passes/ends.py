"""ends: find f where the model computes its loss itself.

A language model that is called with labels returns its loss, and `loss = lambda out: out.loss` only hands it on. That
output is a number and cannot be f: the loss is linear in it, and the Gauss-Newton of a linear function is zero. If it
is a linear function of loss ops alone, f is what these ops read. If it is a mean of a layer's output (a critic's), f is
that output. Otherwise it is not known where the model ends, and the Gauss-Newton is refused.

An output may be a sum over samples (the divergence that a variational autoencoder returns beside its reconstruction).
If the loss is linear in it, its summands per sample are f in its place. A regulariser adds nothing to f.

Where the loss reads parameters for every sample (a conditional random field's transitions, a policy's deviation that the
model returns), and nothing is asked for that depends on where the model ends, f is each sample's term of the loss.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from fxcurv.errors import LossError
from fxcurv.ir.graph import canonical_args, descendants, is_tensor
from fxcurv.ir.mixing import literal
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import PARTIAL, REPLICATE, Shard
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program, is_active, is_sharded, place
from fxcurv.rules.base import rule_of
from fxcurv.rules.traits import named_loss
from fxcurv.walks.loss import past


def ends(program: Program) -> Program:
    """Where an output is the model's own loss, move f to what the loss op inside the model reads."""
    if program.loss is None or program.options.split or not is_active(program.loss):
        return program
    linearly = _linear_outputs(program)
    heads: dict[fx.Node, None] = {}
    for head in program.heads:
        found = _replacements(program, head, head in linearly) if is_active(head) else None
        heads.update(dict.fromkeys([head] if found is None else found))
    program.heads = list(heads) or program.heads  # all outputs are regularisers
    asked = [e.requires for e in program.extensions]
    needs_f = any(r.of_loss and not r.of_ops or not r.needs_loss for r in asked)
    returned = any(is_active(head) and place(head) == REPLICATE for head in program.heads)
    if not needs_f and (returned or any(r.of_ops for r in asked) and _loss_reads_parameters(program)):
        program.heads = _summands(program, program.loss) or program.heads
    return program


def _loss_reads_parameters(program: Program) -> bool:
    """Whether the loss reads a parameter for every sample, or reads no f: then the whole loss is part of the model."""
    reads = [n for n in past(program) if is_sharded(n) and is_active(n)]
    of_f = program.loss in descendants(program.heads)
    return not of_f or any(is_active(i) and not is_sharded(i) for n in reads for i in n.all_input_nodes)


def check_ends(program: Program, asked: str) -> None:
    """Refuse the quantities `asked`, which need f, if f is hidden behind a number that the model returns."""
    if program.analysis.hidden:
        raise LossError(program.analysis.hidden.format(asked=asked))


def _replacements(program: Program, head: fx.Node, linearly: bool) -> list[fx.Node] | None:
    """The values that are f in place of `head`; None if `head` is f itself, or f is not known (`analysis.hidden`)."""
    stops = [n for n in _nonlinear_sources(program, head) if place(n) != REPLICATE]  # the rest are regularisers
    losses = [n for n in stops if _is_loss(program, n)]
    others = [n for n in stops if n not in losses]
    number = is_tensor(head) and (not head.meta["val"].ndim or place(head) == PARTIAL) and place(head) != REPLICATE
    read = list(dict.fromkeys(leaf for n in losses for leaf in _predictions(program, n)))
    if losses and linearly and not others and all(is_sharded(n) for n in read):
        program.analysis.ends = f"what the model's own loss reads, {_named(losses)}"
        return list(dict.fromkeys(_output_behind(program, n) for n in read))
    if number and linearly and not losses and others and all(map(_is_layer, others)):
        program.analysis.ends = f"what the model sums up itself, of {_named(others)}"
        return list(dict.fromkeys(_output_behind(program, n) for n in others))
    if stops and (linearly and (number or losses) or number and losses):
        at = (others or losses)[0]
        program.analysis.hidden = (
            f"{literal(locate(at))}\nis inside a loss that the model computes itself, so it is not known where it ends and "
            "the loss begins, and {asked} (of the Gauss-Newton) does not exist.\nWay out: split='path of the submodule whose "
            "output is f'; or return that output from the model, and compute the loss in the loss function."
        )
    return _summands(program, head) if linearly else None


def _summands(program: Program, head: fx.Node) -> list[fx.Node] | None:
    """The per-sample values that `head` is a linear function of; None if it has samples itself, or is not linear."""
    found: dict[fx.Node, None] = {}
    seen, stack = set(), [head]
    while stack:
        node = stack.pop()
        if node in seen or is_active(node) and place(node) == REPLICATE:
            continue
        seen.add(node)
        if is_sharded(node):
            found[node] = None
        elif node.op != "call_function" or not _is_linear(program, node):
            return None
        else:
            stack.extend(filter(is_active, node.all_input_nodes))
    if head in found:
        return None
    program.analysis.ends = f"what the model sums up itself, {_named([*found] or [head])}"
    return list(found)


def _named(nodes: list[fx.Node]) -> str:
    return "; ".join(locate(n).replace("\n ", "") for n in nodes)


def _linear_outputs(program: Program) -> set[fx.Node]:
    """The outputs that the loss is a linear function of."""
    linearly: set[fx.Node] = set()
    otherwise: set[fx.Node] = set()
    seen, stack = set(), [(program.loss, True)]
    while stack:
        node, straight = stack.pop()
        if (node, straight) in seen:
            continue
        seen.add((node, straight))
        if node in program.heads:
            (linearly if straight else otherwise).add(node)
        else:
            straight = straight and _is_linear(program, node)
            stack.extend((source, straight) for source in node.all_input_nodes if is_active(source))
    return linearly - otherwise


def _nonlinear_sources(program: Program, head: fx.Node) -> list[fx.Node]:
    """The values that `head` is a linear function of, and that no linear op makes (a loss op counts as none)."""
    found: dict[fx.Node, None] = {}
    seen, stack = set(), [head]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op != "call_function" or _is_loss(program, node) or not _is_linear(program, node):
            found[node] = None
        else:
            stack.extend(source for source in node.all_input_nodes if is_active(source))
    return list(found)


def _is_linear(program: Program, node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    leaves = pytree.tree_leaves(canonical_args(node))
    return rule_of(node.target, program.rules).linear([i for i, leaf in enumerate(leaves) if is_active(leaf)])


def _is_loss(program: Program, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return rule_of(node.target, program.rules).is_loss or named_loss(_captured_op(node))


def _captured_op(node: fx.Node) -> str:
    return str(node.meta.get("origin", {}).get("op") or node.target)


def _predictions(program: Program, node: fx.Node) -> list[fx.Node]:
    """The differentiable values that a loss op reads. Several nodes may have been made of the op."""
    op = _captured_op(node)
    found: dict[fx.Node, None] = {}
    seen, stack = set(), [node]
    while stack:
        member = stack.pop()
        if member in seen:
            continue
        seen.add(member)
        for source in filter(is_active, member.all_input_nodes):
            if source.op == "call_function" and _is_loss(program, source) and _captured_op(source) == op:
                stack.append(source)
            elif place(source) != REPLICATE:
                found[source] = None
    return list(found)


def _output_behind(program: Program, value: fx.Node) -> fx.Node:
    """The model's output that `value` is a linear function of, which is f as the user knows it; else `value`."""
    node = value
    while node not in program.output_leaves:
        sources = [i for i in node.all_input_nodes if is_active(i)]
        if (
            len(sources) != 1
            or node.op != "call_function"
            or not _is_linear(program, node)
            or not is_sharded(sources[0])
        ):
            return value
        (node,) = sources
    return node if isinstance(place(node), Shard) and isinstance(node.meta.get("val"), Tensor) else value


def _is_layer(node: fx.Node) -> bool:
    """Whether an op computes per-sample values with a parameter: a sum of these is not the loss of an earlier value."""
    return is_sharded(node) and any(is_active(i) and place(i) == REPLICATE for i in node.all_input_nodes)
