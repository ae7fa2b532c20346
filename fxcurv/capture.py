"""Model and loss to a `Program`: `torch.export` to a functional graph of ATen ops with a symbolic batch.

What export would lose silently is kept or refused here: the leaves that the loss reads are marked, outputs of
`no_grad` regions are detached, custom autograd functions keep their backward (`custom.py`).
"""

from __future__ import annotations

import contextlib
import copy
import linecache
import math
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from fxcurv._torch import (
    GuardOnDataDependentSymNode,
    OpOverload,
    captured_size,
    fake_tensor_log,
    original,
    patched,
    schema_of,
)
from fxcurv.arguments import Arguments, described, filled, map_leaves, templated
from fxcurv.custom import functions_as_targets, kept_functions
from fxcurv.errors import (
    ArgumentError,
    CaptureError,
    FxcurvError,
    LossError,
    is_user_file,
    source_line,
)
from fxcurv.program import Batch, Input, Program
from fxcurv.python_state import Number, Path, Reads
from fxcurv.side_effects import no_side_effects


@torch.library.custom_op("fxcurv::head", mutates_args=())
def head(x: Tensor) -> Tensor:
    """Marks a leaf of the model's output; removed by `normalize`."""
    return x.clone()


@head.register_fake
def _(x):
    return torch.empty_like(x)


class _Record:
    """What a trace leaves behind besides its graph (no pytree: export restores those)."""

    template: Any = None
    leaves: int = 0
    fixed_by: Any = None


class _Captured(nn.Module):
    """What is exported: the model, its marked output leaves, and the loss on them."""

    def __init__(self, model: nn.Module, loss: Callable | None, arguments: Arguments, split: str | None, reads: Reads):
        super().__init__()
        self.reads = reads
        self.model = model
        self.loss = loss
        self.arguments = arguments
        self.split = split
        self.record = _Record()

    def forward(self, inputs, targets, numbers):
        with self.reads.numbers(numbers), self.reads:
            return self._run(inputs, targets)

    def _run(self, inputs, targets):
        args, kwargs = filled(self.arguments.input_template, inputs)
        marked: list[Tensor] = []

        def mark(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            marked.append(head(t))
            return marked[-1]

        with self._split_at(self.split, mark) if self.split else contextlib.nullcontext():
            output = self.model(*args, **kwargs)
        map_leaves(output, Number, Number.refuse)
        output = output if self.split else map_leaves(output, Tensor, mark)
        leaves: list[Tensor] = []
        self.record.template = templated(output, leaves)
        self.record.leaves = len(leaves)
        loss = None
        if self.loss is not None:
            loss = _scalar(self._loss_of(self.loss, output, self.arguments.join_targets(targets)))
        return loss, leaves, marked

    def _loss_of(self, loss: Callable, output: Any, targets: tuple) -> Any:
        try:
            return loss(output, *targets)
        except (FxcurvError, GuardOnDataDependentSymNode):
            raise
        except Exception as error:
            tensors: list[Tensor] = []
            templated(output, tensors)
            raise ArgumentError(
                f"the loss fails on the model's output, {described(tensors)}, and the targets, "
                f"{described(self.arguments.targets)}:\n"
                f"{_where(error, self)}{type(error).__name__}: {_reason(error)}\n"
                "Way out: targets of the number, shape and dtype that the loss expects (indices: int64)."
            ) from error

    @contextlib.contextmanager
    def _split_at(self, path: str, mark: Callable):
        try:
            module = self.model.get_submodule(path)
        except AttributeError as error:
            raise ArgumentError(f"split='{path}' is no submodule of the model: {error}") from None
        handle = module.register_forward_hook(lambda _module, _args, output: map_leaves(output, Tensor, mark))
        try:
            yield
        finally:
            handle.remove()


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossError(f"the loss is a {type(loss).__name__}, not a tensor: return a scalar, without .item()")
    if loss.numel() != 1:
        raise LossError(f"the loss is {described([loss])}, not a scalar: reduce it by .sum() or .mean()")
    if not loss.is_floating_point():
        raise LossError(f"the loss is {loss.dtype}, so not differentiable: return a floating-point scalar")
    return loss if loss.ndim == 0 else loss.reshape(())


def capture(
    model: nn.Module, loss: Callable | None, arguments: Arguments, split: str | None = None, numbers: Sequence[Path] = ()
) -> Program:
    """Trace `model` and `loss` into a functional graph.

    Args:
        numbers: where floats are that become inputs of the graph.

    Raises:
        CaptureError: if `torch.export` cannot trace them; carries its reason and what usually helps.
        LossError: if the loss is not a scalar tensor.
    """
    reads = Reads(model, loss, numbers)
    wrapped = _Captured(model, loss, arguments, split, reads)
    with _quiet():
        try:
            with _fixed_sizes(wrapped), no_side_effects([m for m in (model, loss) if isinstance(m, nn.Module)]):
                exported = _export(wrapped, arguments)
                _detach_no_grad_regions(exported)
                exported = exported.run_decompositions({})
        except FxcurvError:
            raise
        except Exception as error:
            raise _capture_error(error, wrapped) from error
        reads.check()
        program = _program(model, wrapped, exported, arguments)
        program.state["split"] = split
        program.state["python"] = reads.state(program.constants, [*wrapped.parameters(), *wrapped.buffers()])
        return program


@contextlib.contextmanager
def _quiet():
    """Silence what PyTorch says about its own code while tracing."""
    with warnings.catch_warnings(), mock.patch.object(fake_tensor_log, "disabled", True):
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        weights = r"(self\.[\w.]*_flat_weights\S*\s?)+"  # of nn.LSTM and nn.GRU, which are parameters as well
        assigned = rf"The tensor attributes? {weights}(was|were) assigned during export"
        warnings.filterwarnings("ignore", assigned, UserWarning)
        yield


def _export(wrapped: _Captured, arguments: Arguments) -> ExportedProgram:
    numbers = wrapped.reads.tensors(next(wrapped.model.parameters()).device)
    dims = arguments.batch_dims, arguments.split_dims(), [None] * len(numbers)
    shapes = tuple([{d: Dim.AUTO} if d is not None else None for d in part] for part in dims)
    # autograd saves nothing of tensors made under inference_mode, nor does it like to be asked for the gradient of what is no
    # leaf; export marks its inputs' dynamic dimensions, and unmarks those that the user marked
    inputs, targets = (
        [t.clone() if t.is_inference() else t.detach().requires_grad_(t.requires_grad and t.is_leaf) for t in tensors]
        for tensors in (arguments.inputs, arguments.split_targets())
    )
    was_training = [(m, m.training) for m in wrapped.model.modules()]
    wrapped.training = wrapped.model.training
    try:
        with torch.enable_grad(), kept_functions(), _no_branches(), _user_frames():
            return torch.export.export(wrapped, (inputs, targets, numbers), dynamic_shapes=shapes, strict=False)
    finally:
        for module, training in was_training:
            module.training = training


@contextlib.contextmanager
def _no_branches():
    """Losses of PyTorch that branch on values: said without the branch, or refused."""
    gaussian = patched("torch.nn.functional.gaussian_nll_loss", _gaussian_nll)
    with gaussian, patched("torch.ctc_loss", _no_ctc):
        yield


def _no_ctc(*args, **kwargs):
    raise LossError(
        "ctc_loss: the shapes inside it depend on the values of the target lengths, which torch.export cannot trace, and it "
        f"has no second derivative.\n{_user_line()}Way out: the forward recursion over time in torch.logsumexp, with masks."
    )


def _user_line() -> str:
    """The innermost frame of the user's that is running."""
    frames = [f for f in traceback.extract_stack() if is_user_file(f.filename)]
    return _line(frames[-1].filename, frames[-1].lineno or 0, frames[-1].name) if frames else ""


def _gaussian_nll(input, target, var, full=False, eps=1e-6, reduction="mean"):  # noqa: A002
    """`F.gaussian_nll_loss`; where it raises for a negative variance, this is NaN."""
    if isinstance(var, float):
        var = torch.full_like(input, var)
    if var.shape != input.shape:
        var = var.unsqueeze(-1) if var.shape == input.shape[:-1] else var
        if var.ndim != input.ndim or sum(a != b for a, b in zip(var.shape, input.shape, strict=True)) != 1:
            raise ValueError("var is of incorrect size")
    # the clamp is of the value alone: the derivative passes
    clamped = var + (torch.where(var < 0, torch.nan, var.clamp(min=eps)) - var).detach()
    loss = 0.5 * (clamped.log() + (input - target) ** 2 / clamped)
    loss = loss + 0.5 * math.log(2 * math.pi) if full else loss
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


@contextlib.contextmanager
def _user_frames():
    """Record the user's frames on every node; export keeps only those of functions called `forward`."""

    def keep(_tracer, frames):
        start = max((i for i, f in enumerate(frames) if f.filename == __file__), default=-1)
        return traceback.StackSummary.from_list([f for f in frames[start + 1 :] if is_user_file(f.filename)])

    with patched("torch.fx.proxy.TracerBase._filter_traceback_frames", keep):
        yield


@contextlib.contextmanager
def _fixed_sizes(wrapped: _Captured):
    """Note the op, module and line that first make a number of the batch size, the only symbolic size."""
    name = "torch.fx.experimental.symbolic_shapes.ShapeEnv._set_replacement"
    own = original(name)
    names = {id(m): name for name, m in wrapped.model.named_modules()}

    def replaced(env, symbol, target, *args):
        if target.is_number and wrapped.record.fixed_by is None:
            frames = [frame for frame, _ in traceback.walk_stack(None)]  # the innermost first
            ops = [f.f_locals.get("func") for f in frames]
            modules = [names[id(m)] for f in frames if id(m := f.f_locals.get("self")) in names]
            lines = [f for f in frames if is_user_file(f.f_code.co_filename)]
            wrapped.record.fixed_by = {
                "op": str(next((op for op in ops if isinstance(op, OpOverload)), "")),
                "module": modules[0] if modules else "",
                "stack_trace": "".join(traceback.format_stack(lines[0], 1)) if lines else "",
            }
        return own(env, symbol, target, *args)

    with patched(name, replaced):
        yield


def _capture_error(error: Exception, wrapped: _Captured) -> CaptureError:
    return CaptureError(
        f"torch.export cannot trace the model or its loss:\n"
        f"{_where(error, wrapped)}{type(error).__name__}: {_reason(error)}\n"
        "What usually helps: inputs of the shapes and dtypes that the model expects, no branch on a value "
        "(use torch.where), no .item() or numpy in forward, outputs made of tensors. The full reason is "
        "in the exception's __cause__."
    )


def _reason(error: Exception) -> str:
    return next((line for line in str(error).strip().splitlines() if line.strip()), "")[:400]


def _where(error: Exception, wrapped: _Captured) -> str:
    """The innermost module and the user's line that an exception passed through."""
    names = {id(m): name for name, m in wrapped.named_modules() if name}
    module = line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        this = frame.f_locals.get("self")
        if isinstance(this, nn.Module) and id(this) in names:
            name = names[id(this)].removeprefix("model").removeprefix(".")
            path = f"module '{name}'" if name else "the model"
            module = f"  in {path} ({type(this).__name__})\n"
        if is_user_file(frame.f_code.co_filename):
            line = _line(frame.f_code.co_filename, number, frame.f_code.co_name)
    return module + line


def _line(file: str, number: int, function: str) -> str:
    return f'  File "{file}", line {number}, in {function}: {linecache.getline(file, number).strip()}\n'


def _detach_no_grad_regions(exported: ExportedProgram) -> None:
    """Decomposition inlines `no_grad` regions as ordinary ops: detach what leaves them."""
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    for module in exported.graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        graph = module.graph
        learned = _learned(exported, graph)
        for node in [n for n in graph.nodes if n.target is wrap and n.args[0] is False]:
            _check_writes(module, node, learned)
            for user in [u for u in node.users if isinstance(u.meta.get("val"), Tensor)]:
                with graph.inserting_after(user):
                    detached = graph.call_function(torch.ops.aten.detach.default, (user,))
                detached.meta = dict(user.meta)
                user.replace_all_uses_with(detached)
                detached.args = (user,)
        module.recompile()


def _learned(exported: ExportedProgram, graph: fx.Graph) -> set[fx.Node]:
    """The values that are computed from parameters."""
    parameters, found = exported.graph_signature.inputs_to_parameters, set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in parameters or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _check_writes(module: fx.GraphModule, region: fx.Node, learned: set[fx.Node]) -> None:
    """Autograd differentiates a value that `no_grad` wrote to as if it had not: detaching it would lose its gradient."""
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
            line = source_line(node.meta.get("stack_trace") or "")
            raise CaptureError(
                f"op {node.target} writes under no_grad to a value that depends on parameters, which torch.export cannot keep "
                f"apart from its gradient\n  {line}\nWay out: x = x + (x.clamp(min=eps) - x).detach(), say, in place of "
                "x.clamp_(min=eps)."
            )


def _is_view(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and any(r.alias_info for r in schema.returns) and bool(node.args)


def _drop_effects(graph: fx.Graph, tokens: set[str]) -> None:
    """Drop what orders side effects: checks of values (those of `linalg` under `vmap`) go as asserts do."""
    for node in [n for n in graph.nodes if n.target is torch.ops.higher_order.with_effects]:
        for user in list(node.users):
            if user.args[1] != 0:
                raise CaptureError(f"op {node.args[1]} has side effects and a result, which no derivative passes")
            user.replace_all_uses_with(node.args[0])
            graph.erase_node(user)
        graph.erase_node(node)
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.name in tokens]:
        node.replace_all_uses_with(None)  # type: ignore[arg-type]
        graph.erase_node(node)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _program(model: nn.Module, wrapped: _Captured, exported: ExportedProgram, arguments: Arguments) -> Program:
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
    mutations, loss, leaves, heads = _outputs(signature, outputs, wrapped)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    batch = _batch(placeholders, inputs, arguments)
    program = Program(
        gm, inputs, batch, params, trainable, leaves, heads, loss, mutations, wrapped.record.template,
        constants,
    )  # fmt: skip
    program.state["fake_mode"] = next(
        n.meta["val"].fake_mode for n in placeholders if isinstance(n.meta.get("val"), Tensor)
    )
    if program.fixed and wrapped.record.fixed_by is not None:
        program.state["fixed_by"] = wrapped.record.fixed_by
    program.refresh_output()
    return program


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
        same = [n for n, p in model.named_parameters() if _same(p, constants[target])]
        if same:
            return Input("param", same[0])
        return Input("constant", target)
    given = {"input": len(arguments.inputs), "target": len(arguments.targets)}
    kind = next((k for k, count in given.items() if counts[k] < count), "number")
    counts[kind] += 1
    return Input(kind, index=counts[kind] - 1)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one in memory."""
    layouts = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return a.numel() > 0 and layouts[0] == layouts[1]


def _resolve(module: nn.Module, path: str) -> Tensor:
    *parents, leaf = path.split(".")
    for name in parents:
        module = getattr(module, name)
    return getattr(module, leaf)


def _outputs(signature, outputs, wrapped):
    """(mutations, loss, output leaves, heads) from the exported graph's flat outputs."""
    mutations = {}
    user = []
    for spec, node in zip(signature.output_specs, outputs, strict=True):
        kind = spec.kind.name
        if kind == "BUFFER_MUTATION" and not spec.target.startswith("model."):
            raise CaptureError(f"the loss writes to its buffer '{spec.target}': keep such state outside of it")
        if kind == "BUFFER_MUTATION":
            mutations[spec.target.removeprefix("model.")] = node
        elif kind == "USER_OUTPUT":
            user.append(node)
        elif kind in ("USER_INPUT_MUTATION", "PARAMETER_MUTATION"):
            what = "input" if "INPUT" in kind else "parameter"
            raise CaptureError(f"the model or loss writes to {what} '{spec.target}' in place: clone it first")
    loss, *rest = user
    leaves = wrapped.record.leaves
    return mutations, loss, rest[:leaves], rest[leaves:]


def _batch(placeholders: list[fx.Node], inputs: list[Input], arguments: Arguments) -> Batch:
    """The symbols that stand for the batch size in the captured sizes; none if the model fixed it."""
    n = arguments.batch_size
    symbols: set[Any] = set()
    for node, bound in zip(placeholders, inputs, strict=True):
        val = node.meta.get("val")
        if bound.kind not in ("input", "target") or not isinstance(val, Tensor):
            continue
        dim = arguments.batch_dims[bound.index] if bound.kind == "input" else None
        if dim is not None and not (isinstance(val.shape[dim], torch.SymInt) and val.shape[dim].node.expr.free_symbols):
            return Batch(frozenset(), n)  # fixed for the inputs, though a target that nothing reads keeps its symbol
        for d, size in enumerate(val.shape):
            if isinstance(size, torch.SymInt) and (d == dim or size.node.hint == n):
                symbols |= size.node.expr.free_symbols
                symbols |= captured_size(size).free_symbols if size.node.expr.free_symbols else set()
    return Batch(frozenset(symbols), n)
