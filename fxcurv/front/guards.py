"""Keep or refuse, while export traces, what it would lose or fail on."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import traceback
import warnings
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from fxcurv.errors import CaptureError, LossError, UnsupportedOpError
from fxcurv.front import wrapped
from fxcurv.front.derivatives import gradients
from fxcurv.front.numbers import read, reads
from fxcurv.front.schedules import Number
from fxcurv.front.wrapped import Captured
from fxcurv.ir.origin import is_user_file, running_line
from fxcurv.ir.private import (
    OpOverload,
    decomposition_table,
    in_function_transform,
    original,
    patched,
    pytree,
    rerouted,
    trace_logs,
)
from fxcurv.passes.normalize import NOT_SPARSE

# the file that calls the model while it is traced
_CALLER = wrapped.__file__


@contextlib.contextmanager
def quiet():
    """Silence warnings and logs about PyTorch's own code while tracing."""
    with warnings.catch_warnings(), no_complaints():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        weights = r"(self\.[\w.]*_flat_weights\S*\s?)+"  # of nn.LSTM and nn.GRU: their parameters again
        assigned = rf"The tensor attributes? {weights}(was|were) assigned during export"
        warnings.filterwarnings("ignore", assigned, UserWarning)
        yield


@contextlib.contextmanager
def no_complaints():
    """Drop PyTorch's log records of errors that are raised as well; keep levels that a user asks for, below WARNING."""

    def harmless(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    for log in trace_logs:
        log.addFilter(harmless)
    try:
        yield
    finally:
        for log in trace_logs:
            log.removeFilter(harmless)


@contextlib.contextmanager
def numbered_reductions():
    """Remove decompositions of PyTorch that take the name of a reduction, but are given its number.

    With a symbolic batch, export takes the shape of a loss from its decomposition: `nll_loss` without a reduction would
    have the shape of a scalar (0 is taken for `size_average=False`), and others raise.
    """
    aten = torch.ops.aten
    with mock.patch.dict(decomposition_table):
        for op in (aten.nll_loss, aten.margin_ranking_loss, aten.hinge_embedding_loss):
            decomposition_table.pop(op.default, None)
        yield


@contextlib.contextmanager
def said_otherwise():
    """Replace functions of PyTorch that branch on values, or write where an op does not say so; or refuse them."""
    with contextlib.ExitStack() as stack:
        for name, new in _SAID_OTHERWISE.items():
            stack.enter_context(patched(name, new))
        if _FLEX.rpartition(".")[0] in sys.modules:
            stack.enter_context(rerouted(_FLEX, _no_flex))
        yield


_FLEX = "torch.nn.attention.flex_attention.flex_attention"


def _no_flex(*args, **kwargs):
    raise CaptureError(
        f"flex_attention is not supported: its kernels, and the functions that it is given, have no rule\n{running_line()}"
        "Way out: torch.nn.functional.scaled_dot_product_attention, a mask_mod as a boolean attn_mask= and a score_mod that adds "
        'as one of numbers; for a model of transformers, attn_implementation="sdpa" or "eager".'
    )


def _run_both_branches(pred, true_fn, false_fn, operands=()):
    """`torch.cond` with both branches in the graph.

    The branch that is not taken gets 0.5 for its operands, where a logarithm or root has derivatives: 0 * NaN is NaN.
    """
    if isinstance(pred, bool):
        return (true_fn if pred else false_fn)(*operands)

    def gated(t, taken):
        return torch.where(taken, t, 0.5) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    pred = pred.reshape(())
    yes = true_fn(*pytree.tree_map(lambda t: gated(t, pred), tuple(operands)))
    no = false_fn(*pytree.tree_map(lambda t: gated(t, ~pred), tuple(operands)))
    return pytree.tree_map(lambda a, b: torch.where(pred, a, b), yes, no)


_make_dual = forward_ad.make_dual


def _no_dual(tensor, tangent, *, level=None):
    """Refuse dual numbers except those of `torch.func.jvp`."""
    if in_function_transform():
        return _make_dual(tensor, tangent, level=level)
    raise CaptureError(f"the model or loss makes a dual number, which a trace does not follow\n{running_line()}{_GRAD}")


def _is_declared_causal(mask, is_causal=None, size=None):
    """Whether a mask is causal: only if the caller says so, since PyTorch's own test reads its values."""
    return is_causal is True


def _without_validation(init):
    """`Distribution.__init__` without validation of arguments, and of values later."""

    @functools.wraps(init)
    def unvalidated(self, *shapes, validate_args=None, **named):
        init(self, *shapes[:2], validate_args=False, **named)

    return unvalidated


class Followed(TorchFunctionMode):
    """Replaces what a trace cannot follow: `x.data`, derivatives, and numbers and sizes that are made of values."""

    def __init__(self, wrapped: Captured) -> None:
        super().__init__()
        self.record, self.values = wrapped.record, wrapped.values

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: D105
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func is torch.autograd.grad and not in_function_transform():
            args = pytree.tree_map_only(torch.Tensor, self._strip_mark, args)
            self.record.notes[f"torch.autograd.grad is said in the graph: {running_line().strip()}"] = None
            return gradients(*args, **(kwargs or {}))
        if reads(func, args) and not in_function_transform():
            return read(self.values, func, args, kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], Number):
            return _of_number(*args, **(kwargs or {}))
        if func is torch.eye:
            return _eye(*args, **(kwargs or {}))
        if func in _SPARSE:
            raise UnsupportedOpError(
                f"op {func.__name__}\n{running_line()}gives a tensor of a sparse layout, {NOT_SPARSE}"
            )
        if func is _IN_PIECES:  # PyTorch's pieces compute the derivative ahead, of all samples
            return func(*args, **{**(kwargs or {}), "options": None})
        if func in _OF_CLASSES:  # whose targets may be bytes, which their decompositions do not take
            args = [t.long() if isinstance(t, torch.Tensor) and t.dtype is torch.uint8 else t for t in args]
        if func in (torch.autograd.backward, torch.Tensor.backward):
            raise CaptureError(
                f"the model or loss calls backward(), which writes to tensors' grad\n{running_line()}{_GRAD}"
            )
        return func(*args, **(kwargs or {}))

    def _strip_mark(self, t: torch.Tensor) -> torch.Tensor:
        """The value behind the mark on a leaf of the model's output: what else the loss reads is computed from it."""
        return self.record.marks.get(id(t), (t, t))[1]


def _of_number(number, dtype=None, device=None, **named):
    """`torch.tensor` of a number that stands for a tensor."""
    if named.get("requires_grad"):
        return number.refuse()
    return number.tensor.detach().to(device=device, dtype=dtype or torch.get_default_dtype())


def _eye(n, m=None, *, dtype=None, device=None, **named):
    """`torch.eye`; with a symbolic size, which export would make a constant, by comparing row and column numbers."""
    m = n if m is None else m
    if not isinstance(n, torch.SymInt) and not isinstance(m, torch.SymInt):
        return torch.eye(n, m, dtype=dtype, device=device, **named)
    same = torch.arange(n, device=device).unsqueeze(1) == torch.arange(m, device=device)
    return same.to(torch.get_default_dtype() if dtype is None else dtype)


_SPARSE = (
    torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.sparse_csc_tensor, torch.sparse_bsr_tensor, torch.sparse_bsc_tensor,
    torch.sparse_compressed_tensor,
)  # fmt: skip
_OF_CLASSES = (F.cross_entropy, F.nll_loss)
_IN_PIECES: Any = getattr(F, "linear_cross_entropy", object())  # PyTorch 2.11 has none

_GRAD = "Way out: torch.autograd.grad(y, x, create_graph=True), or torch.func.grad, vjp, jvp."


def _no_ctc(*args, **kwargs):
    raise LossError(
        "ctc_loss: the shapes inside it depend on the values of the target lengths, which torch.export cannot trace, and it "
        f"has no second derivative.\n{running_line()}Way out: the forward recursion over time in torch.logsumexp, with masks."
    )


def _gaussian_nll(input, target, var, full=False, eps=1e-6, reduction="mean"):  # noqa: A002
    """`F.gaussian_nll_loss`, except that a negative variance gives NaN instead of an error."""
    if isinstance(var, float):
        var = torch.full_like(input, var)
    if var.shape != input.shape:
        var = var.unsqueeze(-1) if var.shape == input.shape[:-1] else var
        if var.ndim != input.ndim or sum(a != b for a, b in zip(var.shape, input.shape, strict=True)) != 1:
            raise ValueError("var is of incorrect size")
    # clamp the value alone: the derivative passes, as in PyTorch
    clamped = var + (torch.where(var < 0, torch.nan, var.clamp(min=eps)) - var).detach()
    loss = 0.5 * (clamped.log() + (input - target) ** 2 / clamped)
    loss = loss + 0.5 * math.log(2 * math.pi) if full else loss
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


_run_instance_norm = torch.instance_norm


def _instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled):  # noqa: A002
    """`torch.instance_norm` as the group norm that it is, which keeps the batch symbolic; its writes said by other ops."""
    if not use_input_stats:
        return _run_instance_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)
    if running_mean is not None:
        with torch.no_grad():
            places = list(range(2, input.ndim))
            for kept, of_samples in ((running_mean, input.mean(places)), (running_var, input.var(places))):
                kept.mul_(1 - momentum).add_(momentum * of_samples.mean(0).to(kept.dtype))
    return torch.group_norm(input, input.shape[1], weight, bias, eps, cudnn_enabled)


_SAID_OTHERWISE = {
    "torch.autograd.forward_ad.make_dual": _no_dual,
    "torch.cond": _run_both_branches,
    "torch._higher_order_ops.cond": _run_both_branches,
    "torch.ctc_loss": _no_ctc,
    "torch.instance_norm": _instance_norm,
    "torch.distributions.Distribution.__init__": _without_validation(Distribution.__init__),
    "torch.nn.functional.gaussian_nll_loss": _gaussian_nll,
    "torch.nn.modules.transformer._detect_is_causal_mask": _is_declared_causal,
}


@contextlib.contextmanager
def user_frames():
    """Record the user's frames on every node; export keeps only those of functions called `forward`."""

    def keep(_tracer, frames):
        start = max((i for i, f in enumerate(frames) if f.filename == _CALLER), default=-1)
        return traceback.StackSummary.from_list([f for f in frames[start + 1 :] if is_user_file(f.filename)])

    with patched("torch.fx.proxy.TracerBase._filter_traceback_frames", keep):
        yield


@contextlib.contextmanager
def fixed_sizes(wrapped: Captured):
    """Note the op, module and line that first turn a symbolic size into a number."""
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
