"""Per-token gradients of a language model
=======================================

With `sample="token"` a sample is a position of the output [N, T, C], not an entry of the batch: every letter has a
gradient of its own. Its norm says how far the model would move for this letter, which is not quite how wrong it is there.
"""

# %%
# A poem, a line per entry of the batch (Shakespeare, Sonnet 18).

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcurv
from fxcurv.extensions import BatchL2Grad

POEM = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee."""
LINES = POEM.splitlines()
LETTERS = sorted({*POEM} - {"\n"})
START, PADDING = len(LETTERS), -100  # what stands before a line; what the loss leaves out
LENGTH = max(map(len, LINES))

targets = torch.full((len(LINES), LENGTH), PADDING)
for n, line in enumerate(LINES):
    targets[n, : len(line)] = torch.tensor([LETTERS.index(letter) for letter in line])
inputs = torch.cat([torch.full((len(LINES), 1), START), targets[:, :-1].clamp(min=0)], dim=1)


# %%
# A transformer of one layer that predicts the next letter.


class Model(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()
        self.letter, self.position = nn.Embedding(len(LETTERS) + 1, width), nn.Embedding(LENGTH, width)
        self.first, self.second, self.last = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        """[N, T] -> [N, T, C]."""
        h = self.letter(letters) + self.position.weight
        heads = self.attention(self.first(h)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.joined(mixed.transpose(1, 2).flatten(2))
        h = h + self.narrow(F.gelu(self.wide(self.second(h))))
        return self.head(self.last(h))


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING)


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
STEPS = 60
for _ in range(STEPS):
    optimizer.zero_grad()
    value = loss(model(inputs), targets)
    value.backward()
    optimizer.step()
print(f"{sum(p.numel() for p in model.parameters())} parameters, loss {value:.2f} after {STEPS} steps")

# %%
# One backward pass for the norms of all gradients, [N, T]. Positions of the padding have none.

result = fxcurv.compile(model, loss, [BatchL2Grad()], sample="token")(inputs, targets)
norms = torch.stack([squared for squared in result.batch_l2.values()]).sum(0).sqrt()
each = F.cross_entropy(result.output.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none")
counted = targets.flatten() != PADDING
print(f"padding: largest norm {norms.flatten()[~counted].max():.0e}")
ranks = [t.flatten()[counted].argsort().argsort().double() for t in (norms, each)]
print(f"rank correlation of norm and loss: {torch.corrcoef(torch.stack(ranks))[0, 1]:.2f}")

# %%
# The darker, the larger.

figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
shades = axes.imshow(norms.masked_fill(targets == PADDING, float("nan")).numpy(), cmap="YlOrRd", aspect="auto")
for n, line in enumerate(LINES):
    for t, letter in enumerate(line):
        axes.text(t, n, letter, ha="center", va="center", fontsize=9, family="monospace")
axes.set(title="Norm of the gradient of every letter", xticks=[], yticks=[])
axes.spines[:].set_visible(False)
figure.colorbar(shades, shrink=0.8)
plt.show()
