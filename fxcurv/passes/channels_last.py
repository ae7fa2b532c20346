"""channels_last: images with their channels last in memory, on a CPU.

On a CPU, convolutions are faster with channels last, pooling much faster, and unfolding copies runs of channels. A
convolution's input is brought into that layout once; ops that keep the layout of their input pass it on; any other op,
and the caller, gets values in the layout that they were captured with.

A strided convolution whose channels do not fill vectors reads the captured layout too: with channels last, oneDNN's
weight gradient for AVX2 of a strided 1 x 1 convolution writes beyond its workspace (see `sound`), and a model that has
its channels first would never have called it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import layout as laid_out
from fxcurv.ir.origin import origin_of
from fxcurv.ir.private import enable_python_dispatcher
from fxcurv.ir.program import Program
from fxcurv.rules.base import rule_of
from fxcurv.rules.traits import CONTIGUOUS, KEEP, convolution, random

aten = torch.ops.aten

# multiples of so many channels fill the vectors of AVX2 (8 numbers in float32) and of AVX-512 (16)
VECTOR = 16


def channels_last(program: Program) -> Program:
    """See the module."""
    if any(p.meta["val"].device.type != "cpu" for p in program.params.values()):
        return program
    if not any(_goes_channels_last(n) for n in program.graph.nodes):
        return program
    _Layout(program).run()
    program.graph.eliminate_dead_code()
    program.refresh_output()
    return program


def sound(weight: Sequence[int], stride: Sequence[int], groups: int) -> bool:
    """Whether all kernels of a 2-d convolution are known to be sound with channels last.

    oneDNN copies the pixels that a strided 1 x 1 convolution reads to a workspace. Its weight gradient for AVX2,
    `jit_avx2_1x1_convolution_bwd_weights_t`, writes beyond the workspace where channels are last and fewer than a
    vector holds (seen in oneDNN 3.12 of PyTorch 2.13.0), which corrupts the heap. Strided convolutions of other kernel
    sizes and channels were not seen to do so, but are excluded as well: their soundness is a detail of one release. The
    processor does not count: environment variables change oneDNN's choice, and an exported program runs elsewhere.
    """
    # [outputs, inputs / groups], or of a transposed convolution [inputs, outputs / groups]
    per_group = (weight[0] // groups, weight[1])
    return all(s == 1 for s in stride) or all(c % VECTOR == 0 for c in per_group)


def _goes_channels_last(node: fx.Node) -> bool:
    """Whether the node is a convolution of images that go channels last."""
    conv = convolution(node)
    if conv is None or node.meta["val"].ndim != 4:
        return False
    return sound(conv.weight.meta["val"].shape, conv.stride, conv.groups)


class _Layout:
    """One pass over the nodes in order; `before` holds the old value of each node whose layout changed."""

    def __init__(self, program: Program):
        self.program = program
        self.before: dict[fx.Node, Any] = {}
        self.copies: dict[tuple[fx.Node, torch.memory_format], fx.Node] = {}
        self.shown = {
            *program.output_leaves,
            *program.heads,
            *program.mutations.values(),
            program.loss,
            *program.looked_at(),
        }

    def run(self) -> None:
        for node in list(self.program.graph.nodes):
            if node.op != "call_function":
                continue
            if _goes_channels_last(node):
                x, *rest = node.args
                node.args = (self.copy(x, torch.channels_last, node), *rest)
            elif not _keeps_layout(node):
                fix = lambda a, n=node: self.copy(a, torch.contiguous_format, n) if a in self.before else a  # noqa: E731
                node.args, node.kwargs = fx.node.map_arg(node.args, fix), fx.node.map_arg(node.kwargs, fix)
            self.revalue(node)

    def copy(self, node: fx.Node, form: torch.memory_format, before: fx.Node) -> fx.Node:
        """`node` in the layout `form`."""
        val = node.meta["val"]
        # one channel fits both layouts, and a convolution takes it for channels first
        if val.is_contiguous(memory_format=form) and (form is torch.contiguous_format or val.stride(1) == 1):
            return node
        found = self.copies.get((node, form))
        if found is None:
            with self.program.graph.inserting_before(before):
                found = self.program.graph.call_function(aten.clone.default, (node,), {"memory_format": form})
            found.meta = {**node.meta, "origin": origin_of(node, "forward")}
            found.meta["val"] = self.value(found)
            self.copies[node, form] = found
        return found

    def revalue(self, node: fx.Node) -> None:
        """Compute the value of `node` anew, in the layout that it has now."""
        if not any(i in self.before or i in self.copies.values() for i in node.all_input_nodes):
            return
        old, node.meta["val"] = node.meta["val"], self.value(node)
        if _has_same_layout(old, node.meta["val"]):
            return
        if node in self.shown:
            own = self.copy(node, torch.contiguous_format, node.next)
            if own is not node:
                self.program.replace(node, own)
                own.args = (node,)
        else:
            self.before[node] = old

    def value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
        # as under export: PyTorch's decompositions in Python take symbolic sizes, some of those in C++ do not
        with enable_python_dispatcher(), self.program.fake_mode, torch.no_grad():
            return node.target(*args, **kwargs)


def _keeps_layout(node: fx.Node) -> bool:
    """Whether the node may read a changed layout, and gives its result the same one.

    An op that draws numbers draws them in the order of memory, so it reads the layout that was captured.
    """
    if convolution(node):
        return _goes_channels_last(node)
    if node.target in KEEP or node.target is operator.getitem:
        return True
    return rule_of(node.target, {}).elementwise and not random(node.target) and node.target not in CONTIGUOUS


def _has_same_layout(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor):
        return laid_out(old) == laid_out(new)
    if isinstance(old, tuple | list):
        return all(_has_same_layout(a, b) for a, b in zip(old, new, strict=True))
    return True
