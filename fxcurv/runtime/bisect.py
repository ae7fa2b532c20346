"""Where a program first differs from the model (for `selfcheck`, once a difference is known).

Forward: the output of every module in a plain pass is looked for among the values of the captured graph; the first
module whose output is not there is named, with an op in it. Gradient: autograd through the captured graph tells whether
tracing lost a derivative (then modules' cotangents are compared) or a rule is wrong (then every op's transpose is
compared with autograd's).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import in_loss, locate, module_path
from fxcurv.ir.private import pytree
from fxcurv.ir.program import is_active
from fxcurv.rules.base import rule_of
from fxcurv.rules.call import call_of
from fxcurv.runtime.sums import Pair, unequal

# A generous factor on the tolerance: this looks for wrong values, not for rounding.
LOOSE = 100


def first_difference(check: Any, forward: bool, pairs: dict[str, Pair], wrong: Sequence[str]) -> str:
    """Where the program first differs from the model, as the beginning of a message.

    Args:
        check: the check that failed.
        forward: whether the loss or the output is wrong, not only the gradient.
        pairs: what was compared, by name.
        wrong: the names of the gradients that are wrong.
    """
    events = _Events()
    graph = _Differentiable(check)
    if forward:
        check.run(watch=lambda model: _put_hooks(model, events.note))
        return _explain_forward(check, events, graph)
    if not wrong:
        name = next(name for name, pair in pairs.items() if unequal([pair]))
        return f"capture, in {name.replace('buffer', 'the update of buffer')}:"
    return _explain_gradient(check, graph, wrong, pairs)


def _put_hooks(model: nn.Module, note: Callable[[str, nn.Module, Any], None]) -> None:
    """Have every module tell `note` what it returns."""
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, _args, out, name=name: note(name, m, out))


class _Events:
    """The tensors that modules returned in a plain pass, in order."""

    def __init__(self):
        self.found: list[tuple[str, nn.Module, Tensor]] = []

    def note(self, name: str, module: nn.Module, out: Any) -> None:
        """Note what a module returned; an argument of `_put_hooks`."""
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.found.append((name, module, t.detach().clone()))


class _Differentiable(fx.Interpreter):
    """Runs the captured forward graph on the call's arguments; keeps all values, with their autograd graph."""

    def __init__(self, check: Any):
        super().__init__(check.known.forward, garbage_collect_values=False)
        self.check = check
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        value = self.values[n] = super().run_node(n)
        return value

    def go(self) -> _Differentiable:
        """Run the graph."""
        count = len([n for n in self.module.graph.nodes if n.op == "placeholder"])
        bound = zip(self.check.flat[:count], self.check.known.inputs, strict=False)
        own = self.check.program.params
        given, self.params = [], {}
        for t, what in bound:
            if what.kind == "param" and what.name in own:
                t = self.params[what.name] = t.detach().requires_grad_()
            given.append(t)
        with torch.random.fork_rng(), torch.enable_grad(), self.check.drawing():
            self.run(*given)
        return self

    def nodes(self) -> list[fx.Node]:
        """The ops with a differentiable result, in order."""
        return [
            n
            for n, v in self.values.items()
            if n.op == "call_function" and isinstance(v, Tensor) and v.is_floating_point()
        ]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = b.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax() if b.numel() else b.new_zeros(())
    limit = LOOSE * 100 * torch.finfo(b.dtype).eps * scale
    return torch.allclose(a.detach().to(b.dtype), b.detach(), rtol=0.0, atol=float(limit), equal_nan=True)


def _named(name: str, module: nn.Module) -> str:
    return f"module '{name}' ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"


def _ops_in(nodes: Sequence[fx.Node], name: str) -> list[fx.Node]:
    return [n for n in nodes if module_path(n) == name and not in_loss(n)]


def _explain_forward(check: Any, events: _Events, graph: _Differentiable) -> str:
    graph.go()
    nodes = graph.nodes()
    seen = [v for v in graph.values.values() if isinstance(v, Tensor) and v.is_floating_point()]
    for name, module, out in events.found:
        if any(_close(v, out) for v in seen):
            continue
        own = _ops_in(nodes, name)
        alike = [n for n in own if graph.values[n].shape == out.shape] or own
        at = f"\n{locate(alike[-1])}" if alike else ""
        return f"first seen at what {_named(name, module)} returns:{at}"
    last = [n for n in nodes if in_loss(n)]
    if check.known.forward_loss is not None and check.plain.loss is not None:
        own = graph.values[check.known.forward_loss]
        if not _close(own.reshape(()), check.plain.loss):
            return "the model is captured right, the loss is not:" + (f"\n{locate(last[-1])}" if last else "")
    return "the model and the loss are captured right, a later rewrite or kernel is not:"


def _explain_gradient(check: Any, graph: _Differentiable, wrong: Sequence[str], pairs: dict[str, Pair]) -> str:
    graph.go()
    loss = graph.values[check.known.forward_loss]
    names = [name.removeprefix("the gradient of '")[:-1] for name in wrong]
    found = torch.autograd.grad(loss, [graph.params[n] for n in names], allow_unused=True, retain_graph=True)
    wanted = [pairs[name].want for name in wrong]
    captured = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
    nodes = [n for n in graph.nodes() if graph.values[n].requires_grad]
    gs = torch.autograd.grad(loss, [graph.values[n] for n in nodes], allow_unused=True, retain_graph=True)
    cotangents = {n: g for n, g in zip(nodes, gs, strict=True) if g is not None}
    if all(_close(c, w) for c, w in zip(captured, wanted, strict=True)):
        return _wrong_rule(check, graph, cotangents)
    return _lost_derivative(check, cotangents, nodes)


def _lost_derivative(check: Any, cotangents: dict[fx.Node, Tensor], nodes: list[fx.Node]) -> str:
    """Name the module between the last cotangent, from the loss on, that capture has and the first that it has not."""
    watched = _ModuleCotangents(check)
    after = None
    for name, module, g in reversed(watched.cotangents):
        inside = [n for n in nodes if not name or f"{module_path(n)}.".startswith(f"{name}.")]
        if not any(_close(cotangents[n], g) for n in inside or nodes if n in cotangents):
            if after is None:
                return f"a derivative is lost in capture, between what {_named(name, module)} returns and the loss:"
            own = _ops_in(nodes, after[0])
            at = f"\n{locate(own[-1])}" if own else ""
            return (
                f"a derivative is lost in capture, in {_named(*after)}, or between it and {_named(name, module)}:{at}"
            )
        after = name, module
    inner = f" in {_named(*after)}, or before it" if after else ""
    own = _ops_in(nodes, after[0]) if after else []
    return f"a derivative is lost in capture{inner}:" + (f"\n{locate(own[-1])}" if own else "")


class _ModuleCotangents:
    """Cotangents of all modules' outputs in a plain pass."""

    def __init__(self, check: Any):
        self.events = _Events()
        self.grads: dict[int, Tensor] = {}
        check.run(watch=lambda model: _put_hooks(model, self._note))
        found = [(name, module, self.grads.get(k)) for k, (name, module, _) in enumerate(self.events.found)]
        self.cotangents = [(name, module, g) for name, module, g in found if g is not None]

    def _note(self, name: str, module: nn.Module, out: Any) -> None:
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad:
                k = len(self.events.found)
                self.events.found.append((name, module, t.detach()))
                t.register_hook(lambda g, k=k: self.grads.__setitem__(k, g.detach().clone()))


def _wrong_rule(check: Any, graph: _Differentiable, cotangents: dict[fx.Node, Tensor]) -> str:
    """The op nearest to the loss whose rule gives other cotangents than autograd."""
    program = SimpleNamespace(batch=check.program.batch, graph=graph.module.graph)
    for node in reversed(list(cotangents)):
        if node.target is operator.getitem or not is_active(node):
            continue
        leaves = pytree.tree_leaves(canonical_args(node))
        wrt = tuple(
            k for k, a in enumerate(leaves)
            if isinstance(a, fx.Node) and isinstance(graph.values.get(a), Tensor) and graph.values[a].requires_grad
        )  # fmt: skip
        if not wrt or isinstance(node.meta.get("val"), tuple | list):
            continue
        symbolic = call_of(program, node)  # type: ignore[arg-type]
        call = pytree.tree_map(lambda a: graph.values.get(a, a) if isinstance(a, fx.Node) else a, symbolic)
        call = pytree.tree_map_only(Tensor, Tensor.detach, call)
        rule = rule_of(node.target, check.program.rules)
        try:
            own = rule.transpose(call, wrt, cotangents[node].unsqueeze(0))
        except Exception:  # a rule that can only be traced
            continue
        inputs = [graph.values[leaves[k]] for k in wrt]
        true = torch.autograd.grad(graph.values[node], inputs, cotangents[node], allow_unused=True, retain_graph=True)
        for mine, t in zip(own, true, strict=True):
            if t is not None and not _close(mine.squeeze(0), t):
                return f"{locate(node)}\n{rule.name}: the rule's transpose is not the derivative:"
    return (
        "capture and the transposes of all rules are right; the walk, a reduction over samples or a later pass is not:"
    )
