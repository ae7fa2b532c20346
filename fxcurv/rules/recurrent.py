"""Recurrent layers, unrolled to cell steps by PyTorch's own decompositions, so that every rule applies inside."""

from __future__ import annotations

import torch

from fxcurv.ir.private import decomposition_table
from fxcurv.rules.base import rewrite

aten = torch.ops.aten

for _op in (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input):
    rewrite(_op)(decomposition_table[_op])
