"""A rule that claims a placement for its op, true or not, and an op of the tests' own that mixes samples."""

import torch
from torch import Tensor

from fxcurv.rules.base import Rule


@torch.library.custom_op("fxcurv_tests::centre", mutates_args=())
def centre(x: Tensor) -> Tensor:
    """x without its mean over the batch."""
    return x - x.mean(0)


@centre.register_fake
def _(x):
    return torch.empty_like(x)


centre.register_autograd(lambda ctx, g: g - g.mean(0))

OP = torch.ops.fxcurv_tests.centre.default


class Claims(Rule):
    """A rule that says of its op whatever it was told."""

    def __init__(self, place):
        self.claim = place

    def place(self, sites, args, shape, n):
        return self.claim

    def transpose(self, call, wrt, g):
        return [g - g.mean(1, keepdim=True)] if call.op == OP else super().transpose(call, wrt, g)
