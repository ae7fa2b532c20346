"""Recurrent layers, unrolled to cell steps by PyTorch's decompositions, so that the rules of their ops apply."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.private import decomposition_table
from fxcurv.rules.base import rewrite

aten = torch.ops.aten


@contextlib.contextmanager
def _without_onednn():
    """Switch oneDNN off, without the warning that PyTorch's context gives on machines without Intel GPUs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _unroll(op, x: Tensor, hx: Any, params, biases: bool, layers: int, p: float, train: bool, both: bool, first: bool):
    """The op in cell steps. Each layer is decomposed alone, since PyTorch's decomposition omits dropout between layers.

    oneDNN is off, because with it PyTorch keeps LSTM layers whole, in single precision on a CPU.
    """
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    x, per, directions = x.transpose(0, 1) if first else x, len(params) // layers, 2 if both else 1
    last: list[list[Tensor]] = []
    with _without_onednn():
        for k in range(layers):
            here = [s[directions * k : directions * (k + 1)] for s in states]
            given = here if isinstance(hx, list | tuple) else here[0]
            own = params[per * k : per * (k + 1)]
            x, *ends = decomposition_table[op](x, given, own, biases, 1, 0.0, train, both, False)
            last.append([e.reshape(s.shape) if e.ndim > s.ndim else e for e, s in zip(ends, here, strict=True)])  # 2.11
            if p and train and k < layers - 1:
                x = torch.dropout(x, p, True)
    return (x.transpose(0, 1) if first else x, *map(torch.cat, zip(*last, strict=True)))


for _op in (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input):
    rewrite(_op)(functools.partial(_unroll, _op))
