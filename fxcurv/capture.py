"""Model and loss to a `Program`: `torch.export` to a functional graph of ATen ops with a symbolic batch.

What export would lose silently is kept or refused here: the leaves that the loss reads are marked, outputs of
`no_grad` regions are detached, custom autograd functions are refused by name.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxcurv.errors import ArgumentError, CaptureError, CustomFunctionError, FxcurvError, LossError
from fxcurv.program import Batch, Input, Program


@torch.library.custom_op("fxcurv::head", mutates_args=())
def head(x: Tensor) -> Tensor:
    """Marks a leaf of the model's output; removed by `normalize`."""
    return x.clone()


@head.register_fake
def _(x):
    return torch.empty_like(x)


@dataclasses.dataclass
class Arguments:
    """A call's arguments, flat: tensor leaves of inputs and targets, and how to put them together."""

    inputs: list[Any]
    targets: list[Any]
    input_spec: pytree.TreeSpec
    target_spec: pytree.TreeSpec
    batch_dims: list[int | None]

    @property
    def batch_size(self) -> int:
        sizes = {
            leaf.shape[d]
            for leaf, d in zip(self.inputs, self.batch_dims, strict=True)
            if d is not None and isinstance(leaf, Tensor)
        }
        if len(sizes) != 1:
            raise ArgumentError(
                f"the inputs have batch sizes {sorted(sizes)}: pass batch_dim= (a dimension, or one per input, None "
                "for an input without a batch)"
            )
        return sizes.pop()


def flatten_arguments(inputs: Any, targets: tuple, batch_dim: Any) -> Arguments:
    """Bring `compiled(inputs, *targets)` into a flat form.

    Raises:
        ArgumentError: if the inputs hold no tensor, the batch is empty, or batch sizes disagree.
    """
    if isinstance(inputs, dict):
        structure = ((), inputs)
    else:
        structure = (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})
    leaves, spec = pytree.tree_flatten(structure)
    target_leaves, target_spec = pytree.tree_flatten(targets)
    dims = _batch_dims(leaves, structure, batch_dim)
    arguments = Arguments(leaves, target_leaves, spec, target_spec, dims)
    if arguments.batch_size == 0:
        raise ArgumentError("the batch is empty: pass at least one sample")
    for leaf in (*leaves, *target_leaves):
        if isinstance(leaf, Tensor) and leaf.is_complex():
            raise ArgumentError("complex tensors are not supported: split them into real and imaginary parts")
    return arguments


def _batch_dims(leaves: list[Any], structure: Any, batch_dim: Any) -> list[int | None]:
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ArgumentError("inputs hold no tensor: pass a tensor, or a tuple or dict of tensors")
    if isinstance(batch_dim, dict):
        wanted = [d for name in structure[1] for d in [batch_dim.get(name, 0)] * len(pytree.tree_leaves(structure[1][name]))]
    elif isinstance(batch_dim, tuple | list):
        values = structure[0] if structure[0] else tuple(structure[1].values())
        if len(values) != len(batch_dim):
            raise ArgumentError(f"batch_dim has {len(batch_dim)} entries for {len(values)} inputs: pass one per input")
        wanted = [d for value, d in zip(values, batch_dim, strict=True) for _ in pytree.tree_leaves(value)]
    else:
        wanted = [batch_dim] * len(leaves)
    dims: list[int | None] = []
    for leaf, d in zip(leaves, wanted, strict=True):
        usable = isinstance(leaf, Tensor) and d is not None
        if usable and leaf.ndim == 0:
            raise ArgumentError("an input has no dimensions, so no batch: pass batch_dim= with None for it")
        if usable and not -leaf.ndim <= d < leaf.ndim:
            raise ArgumentError(f"batch_dim {d} is out of range for an input of shape {tuple(leaf.shape)}")
        dims.append(d % leaf.ndim if usable else None)
    return dims


@dataclasses.dataclass(frozen=True)
class Slot:
    """Stands for the tensor leaf with this index in the structure of a model's output."""

    index: int


def map_leaves(value: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    """Apply `fn` to every `kind` in a model's output: pytrees, dataclasses and plain objects."""
    if isinstance(value, kind):
        return fn(value)
    leaves, spec = pytree.tree_flatten(value)
    if not (len(leaves) == 1 and leaves[0] is value):
        return pytree.tree_unflatten([map_leaves(leaf, kind, fn) for leaf in leaves], spec)
    if hasattr(value, "__dict__") and not callable(value):
        new = copy.copy(value)
        for name, member in vars(value).items():
            object.__setattr__(new, name, map_leaves(member, kind, fn))
        return new
    return value


class _Record:
    """What a trace leaves behind besides its graph (no pytree: export restores those)."""

    template: Any = None
    leaves: int = 0


class _Captured(nn.Module):
    """What is exported: the model, its marked output leaves, and the loss on them."""

    def __init__(self, model: nn.Module, loss: Callable | None, arguments: Arguments, split: str | None):
        super().__init__()
        self.model = model
        self.loss = loss
        self.spec = arguments.input_spec, arguments.target_spec
        self.split = split
        self.record = _Record()

    def forward(self, inputs, targets):
        args, kwargs = pytree.tree_unflatten(inputs, self.spec[0])
        marked: list[Tensor] = []

        def mark(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            marked.append(head(t))
            return marked[-1]

        with self._split_at(mark) if self.split else contextlib.nullcontext():
            output = self.model(*args, **kwargs)
        output = output if self.split else map_leaves(output, Tensor, mark)
        leaves: list[Tensor] = []

        def number(t: Tensor) -> Slot:
            leaves.append(t)
            return Slot(len(leaves) - 1)

        self.record.template = map_leaves(output, Tensor, number)
        self.record.leaves = len(leaves)
        loss = None
        if self.loss is not None:
            loss = _scalar(self.loss(output, *pytree.tree_unflatten(targets, self.spec[1])))
        return loss, leaves, marked

    @contextlib.contextmanager
    def _split_at(self, mark):
        try:
            module = self.model.get_submodule(self.split)
        except AttributeError as error:
            raise ArgumentError(f"split='{self.split}' is no submodule of the model: {error}") from None
        handle = module.register_forward_hook(lambda _module, _args, output: map_leaves(output, Tensor, mark))
        try:
            yield
        finally:
            handle.remove()


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossError(f"the loss returned a {type(loss).__name__}, not a tensor: return a scalar tensor")
    if loss.numel() != 1:
        raise LossError(f"the loss has shape {tuple(loss.shape)}, not a scalar: reduce it by .sum() or .mean()")
    if not loss.is_floating_point():
        raise LossError(f"the loss has dtype {loss.dtype}, which is not differentiable: return a floating-point scalar")
    return loss if loss.ndim == 0 else loss.reshape(())


@contextlib.contextmanager
def _no_custom_functions():
    """Refuse custom autograd functions by name: export would differentiate through their forward."""
    original = torch.autograd.Function.apply.__func__

    def apply(cls, *args, **kwargs):
        # torch.library ops carry their own backward, and checkpointing's no-op has none
        if cls.__name__.startswith("GeneratedBackwardFor_") or cls.__name__ == "_NoopSaveInputs":
            return original(cls, *args, **kwargs)
        frames = [f for f in inspect.stack() if "/torch/" not in f.filename and f.filename != __file__]
        where = f"\n  File \"{frames[0].filename}\", line {frames[0].lineno}" if frames else ""
        raise CustomFunctionError(
            f"the model calls the custom autograd function '{cls.__qualname__}', whose backward tracing would drop "
            f"silently.{where}\nWay out: write it as plain PyTorch ops (x + (f(x) - x).detach() for a "
            "straight-through estimator), or as a torch.library.custom_op with register_autograd."
        )

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield


def capture(model: nn.Module, loss: Callable | None, arguments: Arguments, split: str | None = None) -> Program:
    """Trace `model` and `loss` into a functional graph.

    Raises:
        CaptureError: if `torch.export` cannot trace them; carries its reason and what usually helps.
        LossError: if the loss is not a scalar tensor.
    """
    wrapped = _Captured(model, loss, arguments, split)
    exported = _export(wrapped, arguments)
    _detach_no_grad_regions(exported)
    try:
        exported = exported.run_decompositions({})
    except Exception as error:
        raise _capture_error(error) from error
    return _program(model, wrapped, exported, arguments)


def _export(wrapped: _Captured, arguments: Arguments):
    n = arguments.batch_size
    shapes = (
        [{d: Dim.AUTO} if d is not None else None for d in arguments.batch_dims],
        [_target_dims(leaf, n) for leaf in arguments.targets],
    )
    was_training = [(m, m.training) for m in wrapped.model.modules()]
    wrapped.training = wrapped.model.training
    try:
        with torch.enable_grad(), _no_custom_functions():
            return torch.export.export(
                wrapped, (arguments.inputs, arguments.targets), dynamic_shapes=shapes, strict=False
            )
    except FxcurvError:
        raise
    except Exception as error:
        raise _capture_error(error) from error
    finally:
        for module, training in was_training:
            module.training = training


def _target_dims(leaf: Any, n: int) -> dict | None:
    """Which dimension of a target may follow the batch size."""
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return None
    dims = [d for d, s in enumerate(leaf.shape) if s == n] or [d for d, s in enumerate(leaf.shape) if s % n == 0]
    return {dims[0]: Dim.AUTO} if dims else None


def _capture_error(error: Exception) -> CaptureError:
    reason = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    return CaptureError(
        f"torch.export cannot trace the model or its loss: {type(error).__name__}: {reason[:400]}\n"
        "What usually helps: no branch on a tensor's value (use torch.where), no .item() or numpy in forward, inputs and "
        "targets of the shapes and dtypes that the loss expects, outputs made of tensors. The full reason is in the "
        "exception's __cause__."
    )


def _detach_no_grad_regions(exported) -> None:
    """Decomposition inlines `no_grad` regions as ordinary ops: detach what leaves them."""
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    for module in exported.graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        graph = module.graph
        for node in [n for n in graph.nodes if n.op == "call_function" and n.target is wrap and n.args[0] is False]:
            for user in [u for u in node.users if isinstance(u.meta.get("val"), Tensor)]:
                with graph.inserting_after(user):
                    detached = graph.call_function(torch.ops.aten.detach.default, (user,))
                detached.meta = dict(user.meta)
                user.replace_all_uses_with(detached)
                detached.args = (user,)
        module.recompile()


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _program(model: nn.Module, wrapped: _Captured, exported, arguments: Arguments) -> Program:
    gm = fx.GraphModule(exported.graph_module, copy.deepcopy(exported.graph))
    for old, new in zip(exported.graph.nodes, gm.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    signature = exported.graph_signature
    names = _names(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    inputs: list[Input] = []
    params: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    counts = {"input": 0, "target": 0}
    for node in [n for n in gm.graph.nodes if n.op == "placeholder"]:
        bound = _bind(node, signature, exported, model, wrapped, names, constants, counts, arguments)
        inputs.append(bound)
        if bound.kind == "param" and bound.name in trainable:
            params[bound.name] = node
    outputs = list(gm.graph.output_node().args[0])
    mutations, loss, leaves, heads = _outputs(signature, outputs, wrapped)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    batch = _batch(placeholders, inputs, arguments)
    program = Program(
        gm, inputs, batch, params, {n: p.shape for n, p in model.named_parameters() if p.requires_grad}, leaves, heads,
        loss, mutations, wrapped.record.template, constants,
    )  # fmt: skip
    program.state["fake_mode"] = next(
        n.meta["val"].fake_mode for n in placeholders if isinstance(n.meta.get("val"), Tensor)
    )
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
        return Input("constant", target)
    index = counts["input"] + counts["target"]
    kind = "input" if index < len(arguments.inputs) else "target"
    counts[kind] += 1
    return Input(kind, index=index if kind == "input" else index - len(arguments.inputs))


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
        if kind == "BUFFER_MUTATION":
            mutations[spec.target.removeprefix("model.")] = node
        elif kind == "USER_OUTPUT":
            user.append(node)
        elif kind in ("USER_INPUT_MUTATION", "PARAMETER_MUTATION"):
            raise CaptureError(
                f"the model writes to its {'input' if 'INPUT' in kind else 'parameter'} '{spec.target}' in place: clone it first"
            )
    loss, *rest = user
    leaves = wrapped.record.leaves
    return mutations, loss, rest[:leaves], rest[leaves:]


def _batch(placeholders: list[fx.Node], inputs: list[Input], arguments: Arguments) -> Batch:
    """The symbols that stand for the batch size in the captured sizes."""
    n = arguments.batch_size
    symbols = set()
    for node, bound in zip(placeholders, inputs, strict=True):
        val = node.meta.get("val")
        if bound.kind == "input" and isinstance(val, Tensor) and arguments.batch_dims[bound.index] is not None:
            size = val.shape[arguments.batch_dims[bound.index]]
            symbols |= size.node._expr.free_symbols if isinstance(size, torch.SymInt) else set()
            symbols |= size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
        elif bound.kind == "target" and isinstance(val, Tensor):
            for size in val.shape:
                if isinstance(size, torch.SymInt):
                    symbols |= {s for s in size.node._expr.free_symbols if size.node.hint == n}
    return Batch(frozenset(symbols), n)
