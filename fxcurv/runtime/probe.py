"""Check on a call's values that samples are as independent as the placements say (`compile(check="probe")`).

The captured forward graph runs several times in step: as it is, and with the values of all samples, of half of them, or
of the other half exchanged for a neighbour's. There is a pair of halves for every bit of a sample's number, and two
bits run at a time. Any two samples are in different halves for some bit, so every pair that interacts is found, by
three forward passes for each doubling of the batch. Slices are exchanged where a value that depends on no parameter
first meets one, so that constants may still be reduced over the batch. At every op, a `Shard` may move in the exchanged
slices only, and a `Partial` has to move by the sum of both halves' changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import MixedSamplesError
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import MIXED, PARTIAL, Placement, Shard, halves, places_of, samples_back, samples_first
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program, is_active

# Rounding relative to a value's largest entry, in units of its dtype's eps: kernels may sum rows in another order.
ROUNDING = {torch.float64: 1000, torch.float32: 1000, torch.float16: 16, torch.bfloat16: 16}
# Bits whose halves run in step: each takes the memory of two batches.
AT_ONCE = 2


class Probe:
    """The forward graph of a program after its analysis, with the placements to check."""

    def __init__(self, program: Program):
        asked = [type(e).__name__ for e in program.extensions if e.per_sample]
        self.asked = ", ".join(asked)
        self.needed = bool(asked) and not program.batch.whole
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(program.graph, env)
        for old, new in env.items():
            new.meta = dict(old.meta)
        self._gm = fx.GraphModule(program.gm, graph)

    def run(self, flat: Sequence[Any], n: int) -> None:
        """Check the placements at these arguments.

        Args:
            flat: what the placeholders are bound to; more than that is ignored.
            n: the batch size; a single sample has nothing to mix with.

        Raises:
            MixedSamplesError: naming the first op where a sample moves another.
        """
        if self.needed and n > 1:
            pairs = halves(n)
            for start in range(0, len(pairs), AT_ONCE):
                some = [half for pair in pairs[start : start + AT_ONCE] for half in pair]
                _InStep(self._gm, [(), tuple(range(n)), *some], self.asked).run(*flat)


class _InStep(fx.Interpreter):
    """Runs a graph on several batches in step; a value is a list of one entry per batch, or of one if all are equal."""

    def __init__(self, gm: fx.GraphModule, exchanged: list[tuple[int, ...]], asked: str):
        super().__init__(gm)
        self.exchanged, self.asked = exchanged, asked
        self.given = len([n for n in gm.graph.nodes if n.op == "placeholder"])

    def run(self, *args: Any, **_: Any) -> Any:
        return super().run(*args[: self.given])

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        if n.op != "call_function":
            return [super().run_node(n)]
        inputs = {i: self.env[i] for i in n.all_input_nodes}
        if is_active(n) and not any(len(v) > 1 for v in inputs.values()):
            inputs = {i: v if is_active(i) else self._exchange(i, v[0]) for i, v in inputs.items()}
        count = max((len(v) for v in inputs.values()), default=1) if is_active(n) else 1
        out = [
            self._call(n, {i: v[min(k, len(v) - 1)] for i, v in inputs.items()}, k == count - 1) for k in range(count)
        ]
        if count > 1:
            self._check(n, out)
        return out

    def _exchange(self, node: fx.Node, value: Any) -> list[Any]:
        place = node.meta.get("place")
        if not isinstance(place, Shard) or not isinstance(value, Tensor):
            return [value]
        return [exchanged(value, place, samples) for samples in self.exchanged]

    def _call(self, n: fx.Node, values: dict[fx.Node, Any], last: bool) -> Any:
        """Run a node on one batch. All but the last leave the random state as it was, so that all draw the same."""
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), values.__getitem__)
        cuda = sorted({t.device.index or 0 for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.is_cuda})
        with torch.random.fork_rng(cuda, enabled=not last):
            return n.target(*args, **kwargs)

    def _check(self, n: fx.Node, out: list[Any]) -> None:
        places = places_of(n.meta["place"])
        columns = zip(*[v if isinstance(v, tuple | list) else [v] for v in out], strict=True)
        for place, values in zip(places, columns, strict=True):
            if isinstance(values[0], Tensor) and values[0].is_floating_point():
                problem = self._find_problem(place, values)
                if problem:
                    raise MixedSamplesError(
                        f"{locate(n)}\nmixes samples, though its placement says otherwise: {problem}, so {self.asked} (per "
                        "sample) would be wrong.\nWay out: a rule in rules= has to place what this op returns where it is "
                        "(MIXED, where samples interact); ask for what the whole batch has, or report it if the op has no "
                        "rule of yours."
                    )

    def _find_problem(self, place: Placement, values: Sequence[Tensor]) -> str:
        if not values[0].numel():
            return ""
        base, every, *halves_ = [v.double().nan_to_num() for v in values]
        limit = ROUNDING.get(values[0].dtype, 1000) * torch.finfo(values[0].dtype).eps
        scale = max(v.abs().max().item() for v in (base, every, *halves_))
        if isinstance(place, Shard):
            for samples, other in zip(self.exchanged[2:], halves_, strict=True):
                rows = samples_first((other - base).abs(), place)
                size = rows.reshape(rows.shape[0], -1).amax(1)
                size[list(samples)] = 0
                if size.max() > limit * scale:
                    moved = int(size.argmax())
                    return f"exchanging {listed(samples)} moves sample {moved} by {size.max().item():.2g}"
        elif place == PARTIAL and not all(bool(v.isfinite().all()) for v in values):
            return ""  # NaN and infinity do not add up
        elif place == PARTIAL:
            for one, other, samples in zip(halves_[::2], halves_[1::2], self.exchanged[2::2], strict=True):
                error = (every - one - other + base).abs().max().item()
                if error > limit * scale:
                    return f"the changes of {listed(samples)} and of the others do not add up, by {error:.2g}"
        elif place != MIXED and any((v - base).abs().max() > limit * scale for v in (every, *halves_)):
            return "it is said to be the same for all samples, and moves with one"
        return ""


def listed(samples: tuple[int, ...]) -> str:
    """Samples in words."""
    numbers = ", ".join(map(str, samples[:3])) + (", ..." if len(samples) > 3 else "")
    return f"sample{'s' if len(samples) > 1 else ''} {numbers}"


def exchanged(value: Tensor, place: Shard, samples: tuple[int, ...]) -> Tensor:
    """`value` with the slices of `samples` replaced by those of a neighbour, which are as valid as its own."""
    rows = samples_first(value, place)
    index = torch.arange(rows.shape[0], device=value.device)
    for k in samples:
        index[k] = (k + 1) % rows.shape[0]
    return samples_back(rows[index], place) if samples else value
