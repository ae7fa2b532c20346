"""The Hessian's diagonal, exact for any op and reuse of a parameter (Dangel et al. 2020; `walks.columns.residuals`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Combine, Extension, Param
from fxcurv.ir.graph import Subgraph, ancestors, canonical_args
from fxcurv.ir.origin import locate
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program, is_active, is_sharded
from fxcurv.quantity import HessianFactors
from fxcurv.rules.base import rule_of

# Most entries of a parameter that a regulariser may couple: it then takes a Hessian-vector product per entry.
COUPLED = 4096


@dataclass(frozen=True)
class DiagHessian(Extension):
    """diag of the Hessian of L, [*P], including the curvature of a regulariser. Samples may interact."""

    savefield = "diag_h"
    combine = (Combine("sum"),)
    whole_batch = True
    any_sample = True
    requires = HessianFactors()

    def extract(self, param: Param) -> fx.Node:
        if not _read_past_the_heads(param):
            return param.contract(power=2, reduce="vn")
        if param.node not in ancestors(param.program.heads):
            # f does not depend on the parameter, so this is all of it; the walk has parts of it
            return _regulariser_diagonal(param)
        _check_apart(param)
        return param.emit(torch.add, param.contract(power=2, reduce="vn"), _regulariser_diagonal(param))


@dataclass(frozen=True)
class BatchDiagHessian(Extension):
    """diag of the Hessian of every sample's loss, [N, *P], without that of a regulariser."""

    savefield = "diag_h_batch"
    combine = (Combine("rows"),)
    sample_axis = 0
    holds_samples = True
    requires = HessianFactors()

    def extract(self, param: Param) -> fx.Node:
        direct = param.name in param.program.walked.direct
        if _read_past_the_heads(param) and not direct or _read_by_samples(param):
            raise ExtensionError(
                f"{param.label}: the loss reads parameter '{param.name}' for every sample beside the model's output, which is "
                "of no sample's curvature here. Way out: make it part of the model, or DiagHessian or HMP."
            )
        return param.contract(power=2, reduce="v")


def _read_past_the_heads(param: Param, end: fx.Node | None = None) -> bool:
    """Whether the loss, or a part of it, reads a parameter directly, not through the model's output."""
    return any(param.node in node.all_input_nodes for node in _past_the_heads(param.program, end))


def _read_by_samples(param: Param) -> bool:
    """Whether the loss computes a value per sample that reads a parameter directly, not through the model's output."""
    return any(is_sharded(n) and _read_past_the_heads(param, n) for n in _past_the_heads(param.program))


def _check_apart(param: Param) -> None:
    """Refuse a parameter that a loss op in closed form reads through f and directly: the walk would count it twice."""
    terms = [t.node for t in param.program.analysis.terms if t.node is not None]
    at = next((node for node in terms if _read_past_the_heads(param, node)), None)
    if at is not None:
        raise ExtensionError(
            f"{locate(at)}\n{param.label}: it reads parameter '{param.name}' through the model's output and beside it. Way out: "
            "make what the loss does with the parameter part of the model."
        )


def _regulariser_diagonal(param: Param) -> fx.Node:
    """The diagonal of d^2 r / d param^2, where r is the loss with f held constant."""
    program = param.program
    inner = _past_the_heads(program)
    at = _coupling_op(program, param.node, inner)
    if at is not None:
        raise ExtensionError(
            f"{locate(at)}\n"
            f"{param.label}: the loss multiplies the model's output with parameter '{param.name}', so its Hessian is no sum "
            "of one through the output and one of a regulariser. Way out: make that product part of the model."
        )
    outside = list(dict.fromkeys(i for n in inner for i in n.all_input_nodes if i not in inner and i is not param.node))
    r = Subgraph(tuple(inner), (param.node,), tuple(outside), program.loss)
    separable = _separable(param, inner)
    if not separable and param.node.meta["val"].numel() > COUPLED:
        raise ExtensionError(
            f"{param.label}: the regulariser couples the {param.node.meta['val'].numel()} entries of '{param.name}', more than "
            f"{COUPLED}. Way out: an elementwise regulariser, or add its diagonal yourself."
        )
    return param.emit(_diagonal, r, separable, param.node, outside)


def _past_the_heads(program: Program, end: fx.Node | None = None) -> list[fx.Node]:
    """The nodes that compute the loss, or a part of it, from f."""
    found, stack = set(), [end or program.loss]
    while stack:
        node = stack.pop()
        if node not in found and node not in program.heads and node.op == "call_function":
            found.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in program.graph.nodes if n in found]


def _coupling_op(program: Program, param: fx.Node, inner: list[fx.Node]) -> fx.Node | None:
    """The op that keeps the loss from being a sum of a function of the output and one of `param` itself; else None."""
    of_output = {h for h in program.heads if param in ancestors([h])}
    of_param = {param}
    for node in inner:
        sources = set(node.all_input_nodes)
        both = bool(sources & of_output and sources & of_param)
        positions = [
            k for k, a in enumerate(pytree.tree_leaves(canonical_args(node))) if isinstance(a, fx.Node) and is_active(a)
        ]
        if both and not rule_of(node.target, program.rules).linear(positions):
            return node
        of_output |= {node} if sources & of_output and is_active(node) else set()
        of_param |= {node} if sources & of_param and is_active(node) else set()
    return None


# entry i of a value is a function of: entry i of the parameter, one of its entries, any number of them
OWN, ONE, MANY = range(3)


def _separable(param: Param, inner: list[fx.Node]) -> bool:
    """Whether the Hessian in the parameter is diagonal by construction: ops on joined entries are all linear."""
    reads = {param.node: OWN}
    for node in inner:
        given = {source: reads[source] for source in node.all_input_nodes if source in reads}
        if not given:
            continue
        leaves = pytree.tree_leaves(canonical_args(node))
        rule = rule_of(node.target, param.program.rules)
        here, shape = max(given.values()), getattr(node.meta["val"], "shape", None)
        if not (rule.elementwise or rule.index_map) or here == ONE and len(given) > 1:
            here = MANY
        elif here == OWN and not (rule.elementwise and shape == param.node.meta["val"].shape):
            here = ONE if len(given) == 1 else MANY
        if here == MANY and not rule.linear([i for i, leaf in enumerate(leaves) if leaf in reads]):
            return False
        reads[node] = here
    return True


def _diagonal(r: Subgraph, separable: bool, param: Tensor, outside: list[Tensor]) -> Tensor:
    _, pull = torch.func.vjp(torch.func.grad(lambda p: r([p], outside)), param)
    if separable:
        return pull(torch.ones_like(param))[0]
    eye = torch.eye(param.numel(), dtype=param.dtype, device=param.device)
    rows = torch.vmap(pull)(eye.reshape(-1, *param.shape))[0]
    return rows.reshape(eye.shape).diagonal().reshape(param.shape)
