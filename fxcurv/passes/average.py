"""average: carry the averaged matrix M of KFRA down to the parameters."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

from torch import fx

from fxcurv.errors import ExtensionError, UnsupportedOpError
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import canonical_args, descendants
from fxcurv.ir.lengths import LengthFixed
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.placement import Shard, places_of
from fxcurv.ir.precision import widely
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program, is_active, is_sharded
from fxcurv.ir.traced import sum_of
from fxcurv.quantity import Averaged
from fxcurv.rules.base import rule_of
from fxcurv.rules.call import call_of
from fxcurv.rules.traits import convolution, random, window
from fxcurv.walks.averaged import mathematics as averages
from fxcurv.walks.averaged.chain import LARGEST, LAST, Matrix, Tail
from fxcurv.walks.averaged.mathematics import Step, Windows
from fxcurv.walks.columns import births


def average(program: Program) -> Program:
    """Carry M to the output of every op that one of KFRA's parameters reaches (`walked.averaged`).

    Raises:
        ExtensionError: where activations branch.
    """
    for extension in program.extensions:
        names = tuple(program.names_of(extension))
        if isinstance(extension.requires, Averaged) and names not in program.walked.averaged:
            program.walked.averaged[names] = _Walk(program, list(names)).run()
    return program


class _Walk:
    def __init__(self, program: Program, names: list[str]):
        self.program = program
        self.reached = descendants([program.params[n] for n in names])
        self.arrived: dict[fx.Node, list[fx.Node]] = {}
        self.steps: dict[fx.Node, Step] = {}
        self.below: dict[fx.Node, fx.Node] = {}
        self.tails: dict[fx.Node, Tail] = {}

    def run(self) -> dict[fx.Node, Matrix]:
        for value, m in [(value, m) for value, m in _births(self.program) if value in self.reached]:
            self._follow_chain(value)
            self.arrived.setdefault(_op(value)[0], []).append(m)
        for bottom in [n for n in self.steps if n not in self.below]:
            self._plan(bottom)
        skipped = {n for lazy in self.tails.values() for n in lazy.ops}
        found = {}
        for node in [n for n in reversed(self.program.graph.nodes) if n in self.steps]:
            step = self.steps[node]
            if node in self.tails:
                found[node] = Matrix(self._emit_summed(node), step.y, True)
            elif node not in skipped or node in self.arrived:
                parts = self.arrived[node]
                m = parts[0] if len(parts) == 1 else self._emit(node, sum_of, parts)
                found[node] = Matrix(m, step.y)
                if node in self.below and node not in skipped:
                    self.arrived.setdefault(self.below[node], []).append(self._carry(node, m))
        return found

    def _emit(self, node: fx.Node, fn, *args) -> fx.Node:
        try:
            return emit(self.program, widely, fn, *args, origin={**origin_of(node, "propagate"), "extension": "KFRA"})
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise UnsupportedOpError(f"{locate(node)}\nKFRA cannot pass it: {str(error)[:300]}\n{LAST}") from error

    # the chain

    def _follow_chain(self, value: fx.Node) -> None:
        """Follow the activations from `value` down, one step per op."""
        while True:
            node, output = _op(value)
            if node in self.steps:
                if self.steps[node].output != output:
                    raise ExtensionError(f"KFRA: {locate(node)}\nhas two outputs that the loss reads.\n{LAST}")
                return
            leaves = pytree.tree_leaves(canonical_args(node))
            data = [i for i, leaf in enumerate(leaves) if leaf in self.reached and is_sharded(leaf)]
            if len(data) > 1:
                raise ExtensionError(
                    f"KFRA: {locate(node)}\njoins two branches of activations. Its recursion, the average of J^T M J over "
                    f"samples, exists down a chain only.\n{LAST}"
                )
            position = data[0] if data else -1
            below = leaves[data[0]] if data else value
            places = places_of(node.meta["place"])
            self.steps[node] = Step(
                output, position, below.meta["place"], value.meta["place"], tuple(places),
                _slice_shape(self.program, below), _slice_shape(self.program, value),
            )  # fmt: skip
            if not data:
                return
            self.below[node] = _op(below)[0]
            value = below

    def _kind(self, node: fx.Node) -> str:
        """Which function of `averages` takes M through the op."""
        program, step = self.program, self.steps[node]
        rule, leaves = rule_of(node.target, program.rules), pytree.tree_leaves(canonical_args(node))
        sharded = [i for i, leaf in enumerate(leaves) if is_sharded(leaf) and i != step.position]
        same = step.x == step.y and step.place_x == step.place_y
        if rule.in_order or (rule.shifts and same and step.position == 0):
            return "identity"
        floating = all(leaves[i].meta["val"].is_floating_point() for i in sharded)
        if not random(node.target) and floating and rule.linear([step.position, *sharded]):
            return "constant"
        if rule.elementwise and same:
            return "diagonal"
        return "max_pooled" if rule.picks and window(node) and step.output == 0 else "per_sample"

    def _carry(self, node: fx.Node, m: fx.Node) -> fx.Node:
        """M at the argument of the op, from M at its output."""
        step, kind = self.steps[node], self._kind(node)
        self._check_size(node, prod(step.x))
        if kind == "identity":
            source = pytree.tree_leaves(canonical_args(node))[step.position]
            return self._emit(node, averages.identity, m, source.meta["val"].dtype)
        call = call_of(self.program, node)
        if kind == "max_pooled":
            return self._emit(node, averages.max_pooled, call, step, m)
        return self._emit(node, getattr(averages, kind), rule_of(node.target, self.program.rules), call, step, m)

    def _check_size(self, node: fx.Node, features: int) -> None:
        size = self._bytes(node, features)
        if size > LARGEST:
            raise ExtensionError(
                f"KFRA: {locate(node)}\nreads {features} features per sample, whose matrix takes {size / 2**30:.0f} GiB.\n{LAST}"
            )

    def _bytes(self, node: fx.Node, features: int) -> int:
        (source,) = [a for a in node.all_input_nodes if a in self.reached and is_sharded(a)]
        return source.meta["val"].element_size() * features**2

    # the first convolution

    def _plan(self, bottom: fx.Node) -> None:
        """Choose the ops above a first convolution that are passed without their M: only its sums are needed."""
        conv = convolution(bottom)
        if conv is None or conv.groups != 1 or bottom in self.arrived:
            return
        tail = self._channelwise_ops(bottom)
        options = [
            (self._cost_of(tail, k, by_offsets), k, by_offsets) for k in range(len(tail) + 1) for by_offsets in (0, 1)
        ]
        _, k, by_offsets = min(options)
        if k:
            self.tails[bottom] = Tail(tail[:k], bool(by_offsets))

    def _channelwise_ops(self, bottom: fx.Node) -> list[fx.Node]:
        """The ops above `bottom` that act on every channel alone, the nearest first."""
        tail: list[fx.Node] = []
        node = bottom
        while True:
            above = [n for n, b in self.below.items() if b is node]
            if len(above) != 1 or (tail and node in self.arrived) or not self._acts_on_channels(above[0]):
                return tail
            node = above[0]
            tail.append(node)

    def _acts_on_channels(self, node: fx.Node) -> bool:
        step, rule, args = self.steps[node], rule_of(node.target, self.program.rules), canonical_args(node)
        if step.place_x != Shard(0) or step.place_y != Shard(0) or step.x[1:2] != step.y[1:2] or step.output:
            return False
        if any(is_active(a) and not is_sharded(a) for a in pytree.tree_leaves(args)):
            return False
        spatial, mixed = len(step.x) - 2, rule.mixed_axes(args)
        if mixed is None or mixed > spatial:
            return False
        if rule.picks:
            return mixed == spatial == 2 and len(step.y) == 4
        return self._kind(node) in ("constant", "diagonal")

    def _cost_of(self, tail: list[fx.Node], k: int, by_offsets: int) -> float:
        """FLOPs until the sums over positions are known, when the lowest k ops of the tail are passed without their M."""
        n, flops = self.program.batch.size, 0.0
        for node in tail[k:]:
            step, deep = self.steps[node], self._offsets(node) * prod(self.steps[node].y)
            flops += 2.0 * deep**2 * (1 if self._kind(node) == "constant" else n) + 8.0 * prod(step.x) ** 2
            if self._bytes(node, prod(step.x)) > LARGEST:
                return float("inf")
        if not k:
            return float("inf") if by_offsets else flops
        rows = prod(1 if self._kind(node) == "constant" else n for node in tail[: k - by_offsets])
        deep = prod(self.steps[tail[k - 1]].y)
        if rows * deep > 8 * averages.ROOM or (by_offsets and self._kind(tail[k - 1]) != "max_pooled"):
            return float("inf")
        pairs = (self._offsets(tail[k - 1]) * deep) ** 2 if by_offsets else deep**2
        return flops + 1.1 * pairs * (rows + (n if by_offsets else 0))

    def _offsets(self, node: fx.Node) -> int:
        return prod(Windows.of(canonical_args(node)).kernel) if self._kind(node) == "max_pooled" else 1

    def _emit_summed(self, bottom: fx.Node) -> fx.Node:
        tail, by_offsets = self.tails[bottom].ops, self.tails[bottom].by_offsets
        parts = self.arrived[tail[-1]]
        m = parts[0] if len(parts) == 1 else self._emit(tail[-1], sum_of, parts)
        given: list[Any] = [
            (rule_of(n.target, self.program.rules), call_of(self.program, n), self.steps[n], self._kind(n))
            for n in reversed(tail)
        ]
        return self._emit(bottom, averages.summed, given, self.steps[bottom].y, by_offsets, m)


def _op(value: fx.Node) -> tuple[fx.Node, int]:
    """The op that made a value, and which of its outputs it is."""
    return (value.args[0], value.args[1]) if value.target is operator.getitem else (value, 0)  # type: ignore


def _slice_shape(program: Program, node: fx.Node) -> tuple[int, ...]:
    """The shape of one sample's slice (`samples_first`)."""
    if program.batch.lengths:
        raise LengthFixed("averaged matrices, which are of one size")
    place = node.meta["place"]
    shape = list(program.batch.shape(node.meta["val"]))
    shape[place.dim] = place.outer * place.inner
    return tuple(shape)


def _births(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """(prediction, sum of the Hessians over samples there) of every loss term."""
    out = []
    if not program.analysis.terms:  # the loss is linear in f
        origin = {"stage": "columns", "op": "Hessian of the loss", "module": "", "extension": "KFRA"}
        for head in program.heads:
            out.append((head, emit(program, averages.none, head, head.meta["place"], origin=origin)))
    for term in program.analysis.terms:
        if term.node is not None:
            rule, c = rule_of(term.node.target, program.rules), program.walked.arrivals[term.node]
            origin = {**origin_of(term.node, "columns"), "extension": "KFRA"}
            m = emit(program, widely, averages.summed_hessian, rule, call_of(program, term.node), c, origin=origin)
            out.append((term.prediction, m))
            continue
        if len(program.heads) > 1:
            raise ExtensionError(f"KFRA: the loss couples {len(program.heads)} outputs of the model.\n{LAST}")
        h = births.hessian_of_loss(program)
        births.check_convex(program, h)
        origin = {"stage": "columns", "op": "Hessian of the loss", "module": "", "extension": "KFRA"}
        out.append((program.heads[0], emit(program, averages.summed_general, h, origin=origin)))
    return out
