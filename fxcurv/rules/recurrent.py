"""Recurrent layers, unrolled to cell steps by PyTorch's own decompositions, so that every rule applies inside."""

from __future__ import annotations

from typing import Any

import torch

from fxcurv.ir.private import decomposition_table
from fxcurv.rules.base import rewrite

aten = torch.ops.aten

for _op in (aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input):
    rewrite(_op)(decomposition_table[_op])


@rewrite(aten.lstm.input)
def _lstm(*args: Any):
    """Without oneDNN, for which the decomposition would keep a layer whole in single precision on a CPU."""
    with torch.backends.mkldnn.flags(enabled=False):
        return decomposition_table[aten.lstm.input](*args)
