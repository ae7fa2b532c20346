"""Make a `Program` of the exported graph: bind placeholders, detach no_grad regions, tell outputs apart."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxcurv.errors import CaptureError
from fxcurv.extensions.parameters import Named
from fxcurv.front.arguments import Arguments
from fxcurv.front.derivatives import expand
from fxcurv.front.plain import say_in_plain
from fxcurv.front.wrapped import Captured
from fxcurv.ir.batch import Batch
from fxcurv.ir.graph import pruned
from fxcurv.ir.lengths import Length
from fxcurv.ir.origin import locate, source_line
from fxcurv.ir.private import captured_size, schema_of
from fxcurv.ir.program import Input, Numbers, Program
from fxcurv.rules.custom import functions_as_targets


def detach_no_grad_regions(exported: ExportedProgram) -> None:
    """Detach the values that leave `no_grad` regions: decomposition inlines the regions as ordinary ops."""
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    for module in exported.graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        graph = module.graph
        learned = _values_of_parameters(exported, graph)
        _check_writes_past_gradients(graph, learned)
        for node in [n for n in graph.nodes if n.target is wrap and n.args[0] is False]:
            _check_writes(module, node, learned)
            for user in [u for u in node.users if isinstance(u.meta.get("val"), Tensor)]:
                with graph.inserting_after(user):
                    detached = graph.call_function(torch.ops.aten.detach.default, (user,))
                detached.meta = dict(user.meta)
                user.replace_all_uses_with(detached)
                detached.args = (user,)
        module.recompile()


def _values_of_parameters(exported: ExportedProgram, graph: fx.Graph) -> set[fx.Node]:
    """The parameters, and the values that are computed from them."""
    parameters, found = exported.graph_signature.inputs_to_parameters, set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in parameters or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _check_writes(module: fx.GraphModule, region: fx.Node, learned: set[fx.Node]) -> None:
    """Refuse a write under `no_grad` to a value of parameters.

    Autograd differentiates such a value as if it had not been written to; detaching it would lose its gradient.
    """
    body = getattr(module, region.args[1].target)
    given = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], region.args[2:], strict=True))
    for node in body.graph.nodes:
        schema = schema_of(node.target)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        written = node.args[0]
        while isinstance(written, fx.Node) and _is_view(written):
            written = written.args[0]
        if given.get(written) in learned:
            raise _write_error(node, "under no_grad")


def _check_writes_past_gradients(graph: fx.Graph, learned: set[fx.Node]) -> None:
    """Refuse a write to `x.detach()` or `x.data` before `x` is read: autograd does not see it, yet `x` changes."""
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in order:
        schema = schema_of(node.target)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        written, detached = node.args[0], False
        while isinstance(written, fx.Node) and _is_view(written):
            detached |= written.target is torch.ops.aten.detach.default
            written = written.args[0]
        if detached and written in learned and _read_after(order, written, node):
            raise _write_error(node, "through detach() or .data")


def _read_after(order: dict[fx.Node, int], value: fx.Node, write: fx.Node) -> bool:
    """Whether a node after a write reads the value, or a view of it that autograd follows."""
    for user in value.users:
        if user.target is torch.ops.aten.detach.default or isinstance(user.meta.get("val"), torch.SymInt):
            continue  # a constant, or a size
        if order[user] > order[write] or _is_view(user) and _read_after(order, user, write):
            return True
    return False


WAYS_OUT = {
    torch.ops.aten.embedding_renorm_.default: "an embedding without max_norm=, and its rows made shorter before each call: "
    "with torch.no_grad(): e.weight.copy_(e.weight.renorm(norm_type, 0, max_norm))"
}


def _write_error(node: fx.Node, how: str) -> CaptureError:
    line = source_line(node.meta.get("stack_trace") or "")
    way_out = WAYS_OUT.get(node.target, "x = x + (x.clamp(min=eps) - x).detach(), say, in place of x.clamp_(min=eps)")
    return CaptureError(
        f"op {node.target} writes {how} to a value that depends on parameters, which torch.export cannot keep apart from its "
        f"gradient\n  {line}\nWay out: {way_out}."
    )


def _is_view(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and any(r.alias_info for r in schema.returns) and bool(node.args)


def _drop_effects(graph: fx.Graph, tokens: set[str]) -> None:
    """Drop ops with side effects, checks of values (as in `linalg` under `vmap`), and the tokens that order them."""
    for node in [n for n in graph.nodes if n.target is torch.ops.higher_order.with_effects]:
        for user in list(node.users):
            if user.args[1] != 0:
                line = source_line(node.meta.get("stack_trace") or "")
                raise CaptureError(
                    f"op {node.args[1]} has side effects and a result, which no derivative passes\n  {line}\n"
                    "Way out: compute the result by an op without side effects, or outside of the model and the loss."
                )
            user.replace_all_uses_with(node.args[0])
            graph.erase_node(user)
        graph.erase_node(node)
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.name in tokens]:
        node.replace_all_uses_with(None)  # type: ignore[arg-type]
        graph.erase_node(node)


def _names(model: Named) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def lift(model: Named, wrapped: Captured, exported: ExportedProgram, arguments: Arguments) -> Program:
    """The exported graph as a `Program`, its placeholders bound to what a call passes."""
    gm = fx.GraphModule(exported.graph_module, copy.deepcopy(exported.graph))
    for old, new in zip(exported.graph.nodes, gm.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    functions_as_targets(gm.graph)
    signature = exported.graph_signature
    _drop_effects(gm.graph, {spec.arg.name for spec in signature.input_specs if spec.kind.name == "TOKEN"})
    names = _names(model)
    trainable = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    inputs: list[Input] = []
    params: dict[str, fx.Node] = {}
    bound_params: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    counts = {"input": 0, "target": 0, "number": 0}
    for node in [n for n in gm.graph.nodes if n.op == "placeholder"]:
        bound = _bind(node, signature, exported, model, wrapped, names, constants, counts, arguments)
        if bound.kind == "param" and bound.name in bound_params:  # also held outside of any module's parameters
            node.replace_all_uses_with(bound_params[bound.name])
            gm.graph.erase_node(node)
            continue
        if bound.kind == "param":
            bound_params[bound.name] = node
        inputs.append(bound)
        if bound.kind == "param" and bound.name in trainable:
            params[bound.name] = node
    outputs = list(gm.graph.output_node().args[0])
    mutations, loss, leaves, heads, numbers, looked_at = _outputs(signature, outputs, wrapped)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    batch = _batch(placeholders, inputs, arguments)
    program = Program(
        gm, inputs, batch, params, trainable, leaves, heads, loss, mutations, wrapped.record.template,
        constants,
    )  # fmt: skip
    program.fake_mode = next(n.meta["val"].fake_mode for n in placeholders if isinstance(n.meta.get("val"), Tensor))
    if wrapped.record.fixed_by is not None:
        program.fixed_by = wrapped.record.fixed_by
    program.reads = _reads(program, numbers, [value for _, value in wrapped.values.read])
    program.observed = wrapped.observers.observed(looked_at)
    program.refresh_output()
    say_in_plain(program)
    expand(program)
    return program


def _reads(program: Program, nodes: list[fx.Node], values: list[Any]) -> Numbers | None:
    """The graph that computes the values that became numbers; None if there are none."""
    if not nodes:
        return None
    program.output.args = (tuple(nodes),)
    lines = [source_line(node.meta.get("stack_trace") or "") for node in nodes]
    return Numbers(fx.GraphModule(program.gm, pruned(program.graph)), tuple(values), tuple(lines))


def _bind(node, signature, exported, model, wrapped, names, constants, counts, arguments) -> Input:
    """What a placeholder stands for."""
    name = node.name
    if name in signature.inputs_to_parameters:
        target = signature.inputs_to_parameters[name]
        tensor = _resolve(wrapped, target)
        if id(tensor) in names:
            return Input("param", names[id(tensor)])
        constants[target] = tensor
        return Input("constant", target)
    if name in signature.inputs_to_buffers:
        target = signature.inputs_to_buffers[name]
        if target.startswith("model."):
            return Input("buffer", target.removeprefix("model."))
        constants[target] = _resolve(wrapped, target)
        return Input("constant", target)
    if name in signature.inputs_to_lifted_tensor_constants:
        target = signature.inputs_to_lifted_tensor_constants[name]
        constants[target] = exported.constants[target]
        same = [n for n, p in model.named_parameters() if _is_same_memory(p, constants[target])]
        if same:
            return Input("param", same[0])
        return Input("constant", target)
    if name in {spec.arg.name for spec in signature.input_specs if spec.kind.name == "CUSTOM_OBJ"}:
        raise _object_error(node)
    given = {"input": len(arguments.inputs), "target": len(arguments.targets)}
    kind = next((k for k, count in given.items() if counts[k] < count), "number")
    counts[kind] += 1
    return Input(kind, index=counts[kind] - 1)


def _object_error(node: fx.Node) -> CaptureError:
    """For an op that is given an object of C++, such as a generator of random numbers."""
    user = next(iter(node.users), node)
    kind = node.meta["val"].class_fqn
    way_out = "compute what it gives outside of the model and the loss, and pass that as an input"
    if kind.endswith("Generator"):
        way_out = "leave out `generator=`, and call torch.manual_seed before the call; or draw outside, and pass that as an input"
    return CaptureError(
        f"op {user.target} takes a {kind}, whose state no program holds\n  {source_line(user.meta.get('stack_trace') or '')}\n"
        f"Way out: {way_out}."
    )


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory with the same layout."""
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a is b
    layouts = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return a.numel() > 0 and layouts[0] == layouts[1]


def _resolve(module: nn.Module, path: str) -> Tensor:
    *parents, leaf = path.split(".")
    for name in parents:
        module = getattr(module, name)
    return getattr(module, leaf)


def _outputs(signature, outputs, wrapped):
    """(mutations, loss, output leaves, heads, values that became numbers, values for hooks), from flat outputs."""
    mutations = {}
    user = []
    for spec, node in zip(signature.output_specs, outputs, strict=True):
        kind = spec.kind.name
        if kind == "BUFFER_MUTATION" and not spec.target.startswith("model."):
            name = spec.target.removeprefix("loss.")
            raise CaptureError(
                f"{locate(node)}\nis what the loss writes to its buffer '{name}'. Way out: keep such state outside of it."
            )
        if kind == "BUFFER_MUTATION":
            mutations[spec.target.removeprefix("model.")] = node
        elif kind == "USER_OUTPUT":
            user.append(node)
        elif kind in ("USER_INPUT_MUTATION", "PARAMETER_MUTATION"):
            what = "input" if "INPUT" in kind else "parameter"
            name = spec.target.removeprefix("model.")
            raise CaptureError(
                f"{locate(node)}\nis what the model or loss writes to {what} '{name}' in place. Way out: clone it first."
            )
    loss, *rest = user
    rest, looked_at = rest[: (of_hooks := len(rest) - len(wrapped.observers.tensors()))], rest[of_hooks:]
    leaves, numbers = wrapped.record.leaves, len(rest) - len(wrapped.values.read)
    return mutations, loss, rest[:leaves], rest[leaves:numbers], rest[numbers:], looked_at


def _batch(placeholders: list[fx.Node], inputs: list[Input], arguments: Arguments) -> Batch:
    """The symbols of the batch size in the captured sizes (none if the model fixed it), and other symbolic sizes."""
    n = arguments.batch_size
    symbols: set[Any] = set()
    given = [
        (bound, node.meta["val"]) for node, bound in zip(placeholders, inputs, strict=True)
        if bound.kind in ("input", "target") and isinstance(node.meta.get("val"), Tensor)
    ]  # fmt: skip
    for bound, val in given:
        dim = arguments.batch_dims[bound.index] if bound.kind == "input" else None
        if dim is not None and not (isinstance(val.shape[dim], torch.SymInt) and val.shape[dim].node.expr.free_symbols):
            return Batch(frozenset(), n)  # the inputs fix it, though a target that nothing reads keeps its symbol
        for d, size in enumerate(val.shape):
            if isinstance(size, torch.SymInt) and (d == dim or size.node.hint == n):
                symbols |= size.node.expr.free_symbols
                symbols |= captured_size(size).free_symbols if size.node.expr.free_symbols else set()
    return Batch(frozenset(symbols), n, False, *_lengths(given, symbols))


def _lengths(given: list[tuple[Input, Tensor]], symbols: set[Any]) -> tuple[tuple[Length, ...], dict[Any, Any]]:
    """(symbolic sizes other than the batch size, each once; the expression in these of every symbol in such sizes)."""
    lengths: dict[Any, Length] = {}
    others: dict[Any, Any] = {}
    for bound, val in given:
        for d, size in enumerate(val.shape):
            if not isinstance(size, torch.SymInt) or captured_size(size).free_symbols <= symbols:
                continue
            expr, at = size.node.expr, Length(size.node.expr, size.node.hint, bound.kind, bound.index, d)
            if expr.is_Symbol and expr not in symbols:
                lengths.setdefault(expr, at)
            others |= {s: size.node.shape_env.replace(s) for s in captured_size(size).free_symbols - symbols}
            others |= {s: s for s in expr.free_symbols - symbols}
    return tuple(lengths.values()), others
