"""Check on a call's values that merged samples (`compile(sample_index=)`) do not interact.

The captured forward graph runs with the entries of half of the samples exchanged for their neighbours'. There is a pair
of halves for every bit of a sample's number, as in `probe`. The other half's rows of the output must not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import MixedSamplesError
from fxcurv.ir.placement import halves
from fxcurv.ir.program import Program
from fxcurv.runtime.bind import cuda_devices
from fxcurv.runtime.probe import ROUNDING, listed


class Merged:
    """The forward graph of a program of merged samples, from its inputs to the rows of the output."""

    needed = False  # for `SelfCheck`: there are no slices of samples, which a `Probe` would exchange

    def __init__(self, program: Program):
        self.asked = ", ".join(type(e).__name__ for e in program.extensions if e.requires.of_gradients)
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(program.graph, env)
        graph.output(tuple(env[h] for h in program.heads))
        graph.eliminate_dead_code()
        self._gm = fx.GraphModule(program.gm, graph)
        of_input = [k for k, what in enumerate(program.inputs) if what.kind == "input"]
        self._positions = {program.inputs[k].index: k for k in of_input}
        self._index, self._edges = program.options.index, program.options.edges
        self._given = len(program.inputs)

    def run(self, flat: Sequence[Any], n: int) -> None:
        """Check the output at these arguments.

        Raises:
            MixedSamplesError: naming samples that move another's row.
        """
        if not self.asked or n < 2 or self._index not in self._positions:
            return
        flat = list(flat[: self._given])
        index = flat[self._positions[self._index]]
        apart = {self._index, *self._edges}
        entries = [
            k for i, k in self._positions.items() if i not in apart and flat[k].ndim and len(flat[k]) == len(index)
        ]
        base = self._rows(flat)
        for samples in [half for pair in halves(n) for half in pair]:
            rows = torch.isin(index, torch.tensor(samples, device=index.device))
            changed = [_exchange(t, rows) if k in entries else t for k, t in enumerate(flat)]
            for old, new in zip(base, self._rows(changed), strict=True):
                self._check(old, new, samples)

    def _rows(self, flat: list[Any]) -> list[Tensor]:
        with torch.random.fork_rng(cuda_devices(flat)), torch.no_grad():
            torch.manual_seed(0)
            return [
                t.double().nan_to_num().flatten(1) if t.ndim > 1 else t.double().unsqueeze(1) for t in self._gm(*flat)
            ]

    def _check(self, old: Tensor, new: Tensor, samples: tuple[int, ...]) -> None:
        moved = (new - old).abs().amax(1)
        moved[list(samples)] = 0
        kind = self._gm.graph.output_node().args[0][0].meta["val"].dtype
        if moved.max() > ROUNDING.get(kind, 1000) * torch.finfo(kind).eps * max(
            old.abs().max().item(), new.abs().max().item()
        ):
            raise MixedSamplesError(
                f"merged samples are not apart: exchanging the entries of {listed(samples)} moves the output of sample "
                f"{int(moved.argmax())} by {moved.max().item():.2g}, so {self.asked} (per sample) would not be of one sample.\n"
                "Way out: no edge between entries of different samples; model.eval() or LayerNorm in place of batch norm in "
                "training mode; sample_index= of the vector that the model itself pools by."
            )


def _exchange(t: Tensor, rows: Tensor) -> Tensor:
    """`t` with the entries at `rows` replaced by their neighbours', which are as valid; equal floats are changed."""
    other = t.roll(1, 0)
    if t.is_floating_point():
        other = torch.where(other == t, 1.5 * t + 0.5, other)
    return torch.where(rows.reshape(-1, *[1] * (t.ndim - 1)), other, t)
