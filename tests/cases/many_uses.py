"""A model whose parameters are used in as many ways as factors have, for tests of pairs of columns."""

import torch
from torch import nn


class Net(nn.Module):
    """Weights used once, at shared positions, twice, and transposed, and one that the loss does not reach."""

    def __init__(self):
        super().__init__()
        self.conv, self.token, self.a = nn.Conv1d(2, 8, 2), nn.Linear(8, 9), nn.Linear(9, 9)
        self.b, self.unused = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        z = torch.tanh(self.token(self.conv(x).mT)).mean(1)
        return self.a(torch.tanh(self.a(z))) @ self.b
