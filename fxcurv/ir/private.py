"""Every private name of PyTorch that this package uses or patches, a row each: no other file uses one.

A name that a version of PyTorch lacks is an error at `import fxcurv`, which says what is missing, instead of one inside a
user's call; a PyTorch that is newer than any tried gets one warning. Private operators (`aten._softmax`) are named by the
rules that are about them, and have a row here. A test reads the whole tree for other uses.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import operator
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

TRIED = ("2.11", "2.12", "2.13", "2.14", "2.15")

# Name -> the versions in which it was seen, each of which was run with this package's tests.
SEEN: dict[str, Sequence[str]] = {
    # tracing
    "torch._dispatch.python.enable_python_dispatcher": TRIED,
    "torch._subclasses.fake_tensor.FakeTensor": TRIED,
    "torch._subclasses.fake_tensor.FakeTensorMode": TRIED,
    "torch._subclasses.fake_tensor.UnsupportedOperatorException": TRIED,
    "torch._subclasses.fake_tensor.disable_fake_tensor_cache": TRIED,
    "torch._subclasses.fake_tensor.unset_fake_temporarily": TRIED,
    "torch._subclasses.functional_tensor.FunctionalTensor": TRIED,
    "torch._subclasses.functional_tensor.dispatch_functionalize": TRIED,
    "torch.fx.experimental.proxy_tensor._extract_tensor_metadata": TRIED,
    "torch.fx.experimental.proxy_tensor.disable_proxy_modes_tracing": TRIED,
    "torch.fx.experimental.proxy_tensor.get_proxy_mode": TRIED,
    "torch.fx.experimental.proxy_tensor.get_proxy_slot": TRIED,
    "torch.fx.experimental.proxy_tensor.make_fx": TRIED,
    "torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode": TRIED,
    "torch.fx.experimental.symbolic_shapes.ShapeEnv": TRIED,
    "torch.fx.experimental.symbolic_shapes.free_unbacked_symbols": TRIED,
    "torch.fx.experimental.sym_node.SymNode._expr": TRIED,
    "torch.utils._pytree": TRIED,
    "torch.utils._python_dispatch.TorchDispatchMode": TRIED,
    # programs on disk
    "torch._dynamo.source.ConstantSource": TRIED,
    "torch.fx.experimental.symbolic_shapes.DimDynamic": TRIED,
    "torch.utils._sympy.functions": TRIED,
    # operators
    "torch._decomp.decomposition_table": TRIED,
    "torch._library.custom_ops._maybe_get_opdef": TRIED,
    "torch._C._dispatch_has_kernel_for_dispatch_key": TRIED,
    "torch._ops.OpOverload": TRIED,
    "torch._ops.OpOverload._can_decompose": TRIED,
    "torch._ops.OpOverload._schema": TRIED,
    # torch.compile
    "torch._dynamo.assume_constant_result": TRIED,
    "torch._dynamo.convert_frame.compile_lock": TRIED,
    "torch._dynamo.maybe_mark_dynamic": TRIED,
    "torch._guards.tracing": TRIED,
    # autograd, memory, modules
    "torch._C.DisableTorchFunction": TRIED,
    "torch._C._are_functorch_transforms_active": TRIED,
    "torch._C._current_graph_task_id": TRIED,
    "torch.autograd.Variable._execution_engine.queue_callback": TRIED,
    "torch._C._is_any_autocast_enabled": TRIED,
    "torch._C._storage_Use_Count": TRIED,
    "torch.UntypedStorage._cdata": TRIED,
    "torch.Tensor._backward_hooks": TRIED,
    "torch.Tensor._base": TRIED,
    "torch.Tensor._is_view": TRIED,
    "torch.Tensor._version": TRIED,
    "torch.nn.Module._buffers": TRIED,
    "torch.nn.Module._forward_hooks": TRIED,
    "torch.nn.Module._forward_pre_hooks": TRIED,
    "torch.nn.Module._parameters": TRIED,
    "torch.nn.modules.loss._Loss": TRIED,
    "torch.distributed.ProcessGroup._get_sequence_number_for_group": TRIED,
    "torch.distributed.device_mesh.DeviceMesh._flatten": TRIED,
    "torch.distributed.distributed_c10d._resolve_process_group": TRIED,
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state": TRIED,
    # says on stderr which op torch.vmap runs one by one
    "torch._C._functorch._set_vmap_fallback_warning_enabled": TRIED,
    # patched while a model is captured
    "torch._functorch.apis.vmap_impl": TRIED,
    "torch._functorch.eager_transforms._jvp_with_argnums": TRIED,
    "torch._functorch.eager_transforms._vjp_with_argnums": TRIED,
    "torch._functorch.eager_transforms.grad_and_value_impl": TRIED,
    "torch._functorch.eager_transforms.grad_impl": TRIED,
    "torch.Tensor.data": TRIED,
    "torch.Tensor.detach_": TRIED,
    "torch.Tensor.grad_fn": TRIED,
    "torch.Tensor.register_hook": TRIED,
    "torch.autograd.graph.saved_tensors_hooks.__enter__": TRIED,
    "torch.autograd.function.FunctionMeta.__init__": TRIED,
    "torch._higher_order_ops.cond": TRIED,
    "torch.autograd.forward_ad.make_dual": TRIED,
    "torch.cond": TRIED,
    "torch.ctc_loss": TRIED,
    "torch.instance_norm": TRIED,
    "torch.detach_": TRIED,
    "torch.inference_mode.__enter__": TRIED,
    "torch.inference_mode.__exit__": TRIED,
    "torch.nn.GRU.forward": TRIED,
    "torch.nn.LSTM.forward": TRIED,
    "torch.nn.RNN.forward": TRIED,
    "torch.nn.utils.rnn.pack_padded_sequence": TRIED,
    "torch.nn.utils.rnn.pad_packed_sequence": TRIED,
    "torch.distributions.Distribution.__init__": TRIED,
    "torch.fx.experimental.symbolic_shapes.ShapeEnv._set_replacement": TRIED,
    "torch.fx.proxy.TracerBase._filter_traceback_frames": TRIED,
    "torch.nn.attention.flex_attention.flex_attention": TRIED,
    "torch.nn.functional.gaussian_nll_loss": TRIED,
    "torch.nn.modules.transformer._detect_is_causal_mask": TRIED,
    "torch.utils.checkpoint.CheckpointFunction": TRIED,
    # operators that captured graphs hold
    "torch.ops._c10d_functional": TRIED,
    "torch.ops.aten._adaptive_avg_pool2d": TRIED,
    "torch.ops.aten._adaptive_avg_pool2d_backward": TRIED,
    "torch.ops.aten._adaptive_avg_pool3d": TRIED,
    "torch.ops.aten._cdist_forward": TRIED,
    "torch.ops.aten._efficientzerotensor": TRIED,
    "torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams": TRIED,
    "torch.ops.aten._fft_c2c": TRIED,
    "torch.ops.aten._fft_c2r": TRIED,
    "torch.ops.aten._fft_r2c": TRIED,
    "torch.ops.aten._fused_sdp_choice": TRIED,
    "torch.ops.aten._linalg_eigh": TRIED,
    "torch.ops.aten._linalg_svd": TRIED,
    "torch.ops.aten._local_scalar_dense": TRIED,
    "torch.ops.aten._log_softmax": TRIED,
    "torch.ops.aten._log_softmax_backward_data": TRIED,
    "torch.ops.aten._native_batch_norm_legit": TRIED,
    "torch.ops.aten._native_batch_norm_legit_functional": TRIED,
    "torch.ops.aten._native_batch_norm_legit_no_training": TRIED,
    "torch.ops.aten._safe_softmax": TRIED,
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": TRIED,
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": TRIED,
    "torch.ops.aten._softmax": TRIED,
    "torch.ops.aten._softmax_backward_data": TRIED,
    "torch.ops.aten._to_copy": TRIED,
    "torch.ops.aten._unsafe_view": TRIED,
    "torch.ops.aten._weight_norm_interface": TRIED,
    "torch.ops.higher_order.with_effects": TRIED,
    "torch.ops.higher_order.wrap_with_set_grad_enabled": TRIED,
}


def find(name: str) -> tuple[Any, str]:
    """(the owner of the last part of a dotted name, that part).

    Raises:
        AttributeError: if there is no such thing in this PyTorch.
    """
    *path, last = name.split(".")
    owner: Any = importlib.import_module(path[0])
    for k, part in enumerate(path[1:], 1):
        if not hasattr(owner, part):
            importlib.import_module(".".join(path[: k + 1]))  # a submodule that nobody imported yet
        owner = getattr(owner, part)
    code = getattr(getattr(owner, "__init__", None), "__code__", None)
    of_instances = isinstance(owner, type) and code is not None and last in (*code.co_names, *code.co_consts)
    if not of_instances and not hasattr(owner, last):
        importlib.import_module(name)
    return owner, last


def check(seen: dict[str, Sequence[str]], version: str) -> None:
    """Refuse a PyTorch that lacks a name; warn of one that is newer than any tried.

    Raises:
        ImportError: names what is missing, and the way out.
    """
    missing = [name for name in seen if not _exists(name)]
    if missing:
        was = "\n".join(f"  {name}, seen in PyTorch {', '.join(seen[name])}" for name in missing)
        raise ImportError(
            f"fxcurv uses private parts of PyTorch that PyTorch {version} does not have:\n{was}\n"
            f'Way out: pip install "torch=={TRIED[-1]}.*", or a newer fxcurv; please report it.'
        )
    if _minor(version) > _minor(TRIED[-1]):
        warnings.warn(
            f"fxcurv was tried with PyTorch {TRIED[0]} to {TRIED[-1]}, and this is {version}: all that it uses of PyTorch is "
            "there, but may behave otherwise. `make smoke TORCH=...` of fxcurv's source tries a version in a minute or so.",
            UserWarning,
            stacklevel=2,
        )


def _exists(name: str) -> bool:
    try:
        find(name)
    except (AttributeError, ImportError):
        return False
    return True


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


check(SEEN, str(torch.__version__))

from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import assume_constant_result as constant_result
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.source import ConstantSource
from torch._guards import tracing
from torch._library.custom_ops import _maybe_get_opdef
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    disable_fake_tensor_cache,
)
from torch._subclasses.fake_tensor import unset_fake_temporarily as without_fake_mode
from torch._subclasses.functional_tensor import FunctionalTensor, dispatch_functionalize
from torch.distributed.distributed_c10d import _resolve_process_group as group_named
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_slot, make_fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode as proxy_mode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    free_unbacked_symbols,
)
from torch.nn.modules.loss import _Loss as Loss
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy import functions

__all__ = [
    "FakeTensor", "FakeTensorMode", "FunctionalTensor", "GuardOnDataDependentSymNode", "Loss", "OpOverload", "SEEN",
    "ShapeEnv", "TRIED", "TorchDispatchMode", "UnsupportedOperatorException", "after_backward", "any_autocast", "base_of",
    "captured_size", "check", "collectives_of", "compile_lock", "constant_result", "decomposes", "decomposition_table",
    "disable_fake_tensor_cache", "disable_proxy_modes_tracing", "dispatch_functionalize", "enable_python_dispatcher",
    "find", "flattened_mesh", "free_unbacked_symbols", "function_of_sizes", "group_named", "has_autograd", "has_hooks",
    "hooks_of_tensor", "in_function_transform", "is_view", "make_fx", "maybe_mark_dynamic", "memory_of", "new_size",
    "no_hooks", "no_torch_functions", "node_of", "original", "own_buffers", "own_forward_hooks", "own_parameters",
    "patched", "precision_of_fsdp", "proxy_mode", "pytree", "registered_functions", "rerouted", "reshards_after_forward",
    "reshards_to", "running_backward", "schema_of", "set_hooks_of_tensor", "trace_logs", "tracing", "uses_of_storage",
    "version_of", "without_fake_mode", "without_forward_hooks", "without_layouts", "without_vmap_warnings",
]  # fmt: skip

# loggers that repeat what a trace raises
trace_logs = [logging.getLogger(known.__module__) for known in (disable_fake_tensor_cache, ShapeEnv)]
# this one says that the size of a batch of one is a number
trace_logs.append(logging.getLogger("torch._export.non_strict_utils"))


def patched(name: str, new: Any) -> Any:
    """`new` in place of something of PyTorch's that has a row here, as a context manager."""
    if name not in SEEN:
        raise LookupError(f"{name} is patched without a row in {__name__}")
    return mock.patch.object(*find(name), new)


@contextlib.contextmanager
def without_vmap_warnings() -> Iterator[None]:
    """Within, `torch.vmap` of an op that it runs one by one is silent."""
    set_enabled = original("torch._C._functorch._set_vmap_fallback_warning_enabled")
    set_enabled(False)
    try:
        yield
    finally:
        set_enabled(True)


@contextlib.contextmanager
def without_layouts() -> Iterator[None]:
    """Within, this thread's traces do not note the layout of every value a second time: comparing symbolic strides is slow."""
    own = threading.get_ident()
    name = "torch.fx.experimental.proxy_tensor._extract_tensor_metadata"
    noted = original(name)

    def extract(*args: Any, **kwargs: Any) -> Any:
        return None if threading.get_ident() == own else noted(*args, **kwargs)

    with patched(name, extract):
        yield


def _instead(*args: Any, **kwargs: Any) -> Any:
    return __fxcurv__(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


@contextlib.contextmanager
def rerouted(name: str, new: Any) -> Iterator[None]:
    """`new` in place of a Python function of PyTorch's that has a row here, also for those who imported it by name.

    The function stays the object that it is; its code calls `new`.
    """
    if name not in SEEN:
        raise LookupError(f"{name} is patched without a row in {__name__}")
    owner, last = find(name)
    function = getattr(owner, last)
    own, defaults, entry = function.__code__, function.__defaults__, f"__fxcurv_{last}"
    function.__globals__[entry] = new
    names = tuple(entry if n == "__fxcurv__" else n for n in _instead.__code__.co_names)
    function.__code__, function.__defaults__ = _instead.__code__.replace(co_names=names), None
    try:
        yield
    finally:
        function.__code__, function.__defaults__ = own, defaults
        del function.__globals__[entry]


def original(name: str) -> Any:
    """What PyTorch has under a name, as its class or module holds it: bind a class method by `__get__(None, cls)`."""
    owner, last = find(name)
    return next(vars(c)[last] for c in getattr(owner, "__mro__", (owner,)) if last in vars(c))


def schema_of(target: Any) -> Any:
    """The schema of an operator; None of anything else."""
    return getattr(target, "_schema", None)


def decomposes(op: OpOverload) -> bool:
    """Whether an operator decomposes into others."""
    return op._can_decompose()


def has_autograd(op: OpOverload) -> bool:
    """Whether a derivative is registered for an operator, in Python or C++."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Autograd")


def registered_functions(op: OpOverload) -> tuple[Any, Any] | None:
    """(backward, setup_context) of a `torch.library.custom_op`, each None if not registered; None for other operators."""
    known = _maybe_get_opdef(op)
    return None if known is None else (known._backward_fn, known._setup_context_fn)


def new_size(env: ShapeEnv, value: int, name: str) -> Any:
    """A new symbol of a shape environment, for a size of this value that was not traced."""
    return env.create_symbol(value, ConstantSource(name), DimDynamic.DYNAMIC)


def function_of_sizes(name: str) -> Any:
    """PyTorch's own function of symbolic sizes with this name; None if there is none."""
    return getattr(functions, name, None)


def captured_size(size: torch.SymInt) -> Any:
    """A symbolic size as it was captured, before any replacement of its symbols."""
    return size.node._expr


def uses_of_storage(tensor: torch.Tensor) -> int:
    """The number of references to a tensor's storage, in C++ and in Python, including those that this function makes."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)


def memory_of(tensor: torch.Tensor) -> int:
    """A number that identifies a tensor's storage as long as that lives."""
    return tensor.untyped_storage()._cdata


def node_of(tensor: torch.Tensor, tracer: Any) -> torch.fx.Node | None:
    """The node of a tensor in a running trace; None if it has none."""
    slot: Any = get_proxy_slot(tensor, tracer, None)
    return None if slot is None else slot.proxy.node


def running_backward() -> int:
    """A number that identifies the running backward pass."""
    return torch._C._current_graph_task_id()


def after_backward(call: Callable[[], None]) -> None:
    """Have `call` run when the running backward pass has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd knows a tensor as a view of another."""
    return tensor._is_view()


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor of which this one is a view; None if it is none."""
    return tensor._base


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version


def without_forward_hooks(module: torch.nn.Module) -> torch.nn.Module:
    """The same layer, its parameters shared, without forward hooks."""
    twin = copy.copy(module)
    twin._forward_hooks = OrderedDict()
    return twin


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether anything runs before or after a module's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextlib.contextmanager
def no_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Within, the hooks before and after the module's own forward pass do not run."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = before, after


def own_forward_hooks(module: torch.nn.Module) -> list[dict[int, Any]]:
    """The tables of hooks that run before and after a module's forward pass."""
    return [module._forward_pre_hooks, module._forward_hooks]


def precision_of_fsdp(module: Any) -> Any:
    """The mixed precision policy of an `FSDPModule`."""
    return module._get_fsdp_state()._mp_policy


def reshards_after_forward(module: Any, outermost: bool) -> bool:
    """Whether an `FSDPModule` drops its parameters between its forward and its backward pass.

    By default the outermost one does not; which one that is, it finds out in its first forward pass.
    """
    state = module._get_fsdp_state()
    if outermost and state._auto_reshard_after_forward:
        return False
    return all(group._reshard_after_forward for group in _groups_of(state))


def reshards_to(module: Any) -> Any:
    """The group of ranks that hold an `FSDPModule`'s parameters between its passes (`reshard_after_forward=2`); else None."""
    found = [g.post_forward_mesh_info for g in _groups_of(module._get_fsdp_state()) if g._use_post_forward_mesh]
    return found[0].shard_process_group if found else None


def _groups_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # 2.11 has one of them
    return [group for group in groups if group is not None]  # None: all parameters belong to other modules


def own_parameters(module: torch.nn.Module) -> dict[str, Any]:
    """A module's parameters without those of its submodules."""
    return module._parameters


def own_buffers(module: torch.nn.Module) -> dict[str, Any]:
    """A module's buffers without those of its submodules."""
    return module._buffers


# tensor -> its hooks for the backward pass, or None; no Python function, because it is called at every call
hooks_of_tensor = operator.attrgetter("_backward_hooks")


def set_hooks_of_tensor(tensor: torch.Tensor, hooks: Any) -> None:
    """Put back hooks from `hooks_of_tensor`, or remove them by None."""
    tensor._backward_hooks = hooks


def collectives_of(group: Any) -> int:
    """How many collectives a process group has begun."""
    return group._get_sequence_number_for_group()


def flattened_mesh(mesh: Any) -> Any:
    """A device mesh of several dimensions as one of one dimension."""
    return mesh._flatten()


def no_torch_functions() -> Any:
    """A context without `__torch_function__`, where export notes that gradients are switched on and off."""
    return torch._C.DisableTorchFunction()


def any_autocast() -> bool:
    """Whether `torch.autocast` is on for any kind of device."""
    return torch._C._is_any_autocast_enabled()


def in_function_transform() -> bool:
    """Whether a transform of `torch.func` is running."""
    return torch._C._are_functorch_transforms_active()
