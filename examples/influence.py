"""Influence of training samples
=============================

Which training images speak for a prediction, and which against it? Influence functions answer with inner products of
gradients through the inverse of the training loss' curvature, for which EKFAC's factors stand in (Grosse et al. 2023).
"""

# %%
# A network on 800 of scikit-learn's digits, 40 of which have a wrong label.

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcurv.plugs.attribution import Attribution

torch.manual_seed(0)
digits = load_digits()
x, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
wrong = torch.randperm(800)[:40]
y = labels.clone()
y[wrong] = (y[wrong] + torch.randint(1, 10, (40,))) % 10

model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
for _ in range(300):
    batch = torch.randint(800, (128,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
accuracy = (model(x[800:]).argmax(1) == labels[800:]).float().mean()
print(f"accuracy on other digits: {accuracy:.2f}")

# %%
# The influence of a sample on its own loss finds those that the others do not speak for.

train = DataLoader(TensorDataset(x[:800], y[:800]), batch_size=200)
attribution = Attribution(model, nn.CrossEntropyLoss(), train)
curvature = attribution.curvature()
own = attribution.self_influence(curvature, damping=1e-3)
suspects = own.topk(40).indices
found = int(torch.isin(suspects, wrong).sum())
print(f"wrong labels among the 40 largest: {found}, by chance 2")

# %%
# Four images that the network has not seen. Beside each are the three training images with the largest scores, which lower its
# loss most where they are trained on, and the three with the smallest. Titles are labels, as trained on.

queries = torch.tensor([801, 817, 840, 866])
scores = attribution.influence([(x[queries], labels[queries])], curvature, damping=1e-3)
figure, panels = plt.subplots(4, 7, figsize=(8, 5.5), layout="constrained")
same = 0
for row, query, score in zip(panels, queries, scores, strict=True):
    helpful, harmful = score.topk(3).indices, (-score).topk(3).indices
    same += int((y[helpful] == labels[query]).sum())
    for axes, i in zip(row, [query, *helpful, *harmful], strict=True):
        axes.imshow(x[i].reshape(8, 8).numpy(), cmap="gray_r")
        axes.set_title(str(int(y[i])), fontsize=9)
        axes.set_axis_off()
for column, title in {0: "query", 2: "helpful", 5: "harmful"}.items():
    panels[0, column].set_title(f"{title}\n{panels[0, column].get_title()}", fontsize=9)
print(f"helpful images with the query's label: {same} of 12")
plt.show()
