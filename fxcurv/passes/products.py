"""products: matrix-free products as programs of their own."""

from __future__ import annotations

import functools
import operator

from torch import fx

from fxcurv.errors import ExtensionError, MixedSamplesError
from fxcurv.ir.emit import constant, samples
from fxcurv.ir.graph import ancestors, closure, copied, dependent
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import MIXED, PARTIAL, Shard
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Input, Program
from fxcurv.operators import AllBlocks, Code, EachBlock, Operator, Parts, Products
from fxcurv.passes.counts import counts
from fxcurv.passes.distribute import given
from fxcurv.passes.ends import check_ends
from fxcurv.passes.placements import placements
from fxcurv.passes.simplify import simplify
from fxcurv.quantity import Product as Wanted
from fxcurv.walks.columns import births
from fxcurv.walks.loss import find_terms
from fxcurv.walks.products.joint import JointGraph, joint_of
from fxcurv.walks.products.partition import repeatable, saved_values, size_of, split
from fxcurv.walks.products.positive import PositiveProduct
from fxcurv.walks.products.walk import Product
from fxcurv.walks.products.zeros import drop_zeros


def products(program: Program) -> Program:
    """Emit every product that an extension requires (`walked.products`)."""
    for extension in program.extensions:
        wanted = extension.requires
        if isinstance(wanted, Wanted):
            names = tuple(program.names_of(extension))
            if (wanted, names) not in program.walked.products:
                program.walked.products[wanted, names] = _build(program, wanted.kind, wanted.modify, names)
    return program


def _build(program: Program, kind: str, modify: str, names: tuple[str, ...]) -> tuple[Products, Operator]:
    """The products with the "ggn", the "hessian" or the "pch" of `program`, for the parameters in `names`.

    Returns:
        (the blocks, the matrix over all these parameters), pytrees of the nodes that the main program has to return.
    """
    saved, code = _positive_products(program, modify, names) if kind == "pch" else _product_of_all(program, kind, names)
    return Products(saved, code), Operator(saved, code)


def _product_of_all(program: Program, kind: str, names: tuple[str, ...]) -> tuple[list[fx.Node], Code]:
    """One product for all parameters, of which every block is a part."""
    if kind == "ggn":
        check_ends(program, "the product with it")
    base, where = joint_of(program, kind)
    if kind == "ggn":
        _check_convex(program, base, where)
    _mark_living(program, base, where)
    joint = base.copy()
    vectors, found = Product(joint, kind, list(names)).run()
    results = _simplify_results(joint.program, found)
    summed: list[str] = []
    if program.options.ranks:
        results = _spread_over_ranks(program, joint.program, where, results)
        summed = [name for name, node in results.items() if node.meta["across"] == PARTIAL]
    saved = saved_values(joint.program, vectors.values(), list(results.values()))
    gm = split(joint.program, saved, list(vectors.values()), list(results.values()))
    labels = [_label(program, n, where) for n in saved]
    return _nodes_in_main(program, saved, where), AllBlocks(
        program, labels, names, gm, list(vectors), list(results), summed
    )


def _spread_over_ranks(
    program: Program, child: Program, where: dict[int, fx.Node], results: dict[str, fx.Node]
) -> dict[str, fx.Node]:
    """The results for samples on several ranks: the caller of the product adds up those that are `Partial`.

    Raises:
        MixedSamplesError: if the product needs a sum over ranks before its end.
    """
    bound = dict(zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True))
    placeholders = child.graph.find_nodes(op="placeholder")
    child.inputs = [bound[where[n.meta["key"]]] if "key" in n.meta else Input("vector") for n in placeholders]
    counts(child)
    simplify(child)
    given(child)
    for node in [n for n in child.graph.find_nodes(op="placeholder") if n not in placeholders]:
        node.meta["key"] = 1 + max(n.meta.get("key", 0) for n in child.graph.nodes)
        where[node.meta["key"]] = samples(program)
    placements(child)
    results = {name: child.extras[f"result {name}"] for name in results}
    moving = dependent(child.graph.nodes, [n for n in placeholders if "key" not in n.meta])
    for node in ancestors(list(results.values())):
        if node in moving and (node.meta["across"] == MIXED or any(n in moving for n in node.meta["complete"])):
            raise MixedSamplesError(
                f"{locate(node)}\nmixes samples of several ranks on the way of a product's vectors, which is not supported with "
                "mesh=. Way out: eval() or GroupNorm in place of batch norm in training mode; weight decay outside of the "
                "loss; or the product without mesh=, of each rank's own batch."
            )
    return results


def _positive_products(program: Program, modify: str, names: tuple[str, ...]) -> tuple[list[fx.Node], Code]:
    """A product per parameter, made when it is first called, because the residuals depend on the parameter.

    It keeps the captured inputs and the outputs of matrix products, convolutions and random ops: all else is cheap.
    """
    if program.options.create_graph:
        raise ExtensionError(
            "create_graph=True with PCHMP: the derivative of the eigendecompositions in it is not defined at repeated "
            "eigenvalues. Way out: HMP or GGNMP, or PCHMP in a call without create_graph."
        )
    if program.options.ranks:
        raise ExtensionError(
            "PCHMP with mesh= is not supported: ask for HMP or GGNMP, or for PCHMP of each rank's own batch"
        )
    base, where = joint_of(program, "pch")
    find_terms(base.program)
    _mark_living(program, base, where)
    needed = ancestors([base.program.loss, *pytree.tree_leaves(list(base.gradients.values()))])
    expensive = {n for n in needed if n.op == "placeholder" or not repeatable(n)}
    items = {n for n in needed if n.target is operator.getitem and n.args[0] in expensive}
    saved = [n for n in needed if n in items or n in expensive and size_of(base.program, n) is not None]
    changing = _updated_buffers(program)  # the call updates them, so they are stale after it
    saved = [n for n in saved if where.get(n.meta["key"]) not in changing]
    labels = [_label(program, n, where) for n in saved]
    emit = functools.partial(_positive_block, base, [n.meta["key"] for n in saved], modify)
    return _nodes_in_main(program, saved, where), EachBlock(program, labels, names, emit)


def _positive_block(base: JointGraph, keys: list[int], modify: str, name: str) -> Parts | None:
    joint = base.copy()
    program = joint.program
    saved = {n.meta["key"]: n for n in program.graph.nodes if n.meta.get("key") in keys}
    vectors, found = PositiveProduct(joint, name, modify).run()
    # as extras, no saved value is merged away
    program.extras = {f"saved {key}": node for key, node in saved.items()}
    if name not in found:
        return None
    results = list(_simplify_results(program, found).values())
    given = [program.extras[f"saved {key}"] for key in keys]
    kept = saved_values(program, vectors.values(), results)
    first = split(program, given, [], kept)
    return first, split(program, kept, list(vectors.values()), results)


def _check_convex(program: Program, base: JointGraph, where: dict[int, fx.Node]) -> None:
    """Have the loss checked for convexity in f; one without closed form only if it is a sum over samples."""
    heads, loss = program.heads, program.loss
    apart = loss.meta["place"] == PARTIAL and all(isinstance(h.meta["place"], Shard) for h in heads)
    for term in find_terms(base.program):
        if term.node is not None:
            births.check_positive(program, term.node, *_nodes_in_main(program, [base.gradients[term.node]], where))
        elif apart:
            births.check_convex(program, births.hessian_of_loss(program))


def _updated_buffers(program: Program) -> set[fx.Node]:
    """The buffers that a call updates."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    bound = zip(placeholders, program.inputs, strict=True)
    return {n for n, what in bound if what.kind == "buffer" and what.name in program.mutations}


def _mark_living(program: Program, base: JointGraph, where: dict[int, fx.Node]) -> None:
    """Mark parameters, buffers and constants: they are in memory whether a product keeps them or not."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    kinds = {n: bound.kind for n, bound in zip(placeholders, program.inputs, strict=True)}
    for node in base.program.graph.nodes:
        if node.op == "placeholder":
            node.meta["lives"] = kinds[where[node.meta["key"]]] in ("param", "buffer", "constant")


def _simplify_results(program: Program, found: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """Merge common subexpressions and drop zeros; returns the new nodes of the results."""
    program.extras.update({f"result {name}": node for name, node in found.items()})
    simplify(program)
    drop_zeros(program)
    simplify(program)
    return {name: program.extras[f"result {name}"] for name in found}


def _nodes_in_main(program: Program, saved: list[fx.Node], where: dict[int, fx.Node]) -> list[fx.Node]:
    """The saved nodes in the main program; those not in it are copied there with what they are computed from."""
    env: dict[fx.Node, fx.Node] = {}
    stop = {n for node in saved for n in ancestors([node]) if n.meta.get("key") in where}
    with program.graph.inserting_before(program.output):
        for node in closure(saved, stop) if saved else []:
            if node in stop:
                env[node] = where[node.meta["key"]]
            elif node.op == "get_attr":
                env[node] = constant(program, getattr(node.graph.owning_module, node.target))
            else:
                env[node] = copied(program.graph, node, env)
                env[node].meta = {k: v for k, v in node.meta.items() if k not in ("key", "active", "place")}
    return [env[n] for n in saved]


def _label(program: Program, node: fx.Node, where: dict[int, fx.Node]) -> str:
    """What a saved value is, in the user's terms."""
    if node.op != "placeholder":
        return f"a value kept of {locate(node)}"
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    if where[node.meta["key"]] not in placeholders:
        return "the number of samples"
    bound = program.inputs[placeholders.index(where[node.meta["key"]])]
    named = {"param": "parameter", "buffer": "buffer", "constant": "constant"}
    return (
        f"{named[bound.kind]} '{bound.name}'" if bound.kind in named else f"tensor {bound.index} of the {bound.kind}s"
    )
