"""Cases by loss, and by the structure of the output that the loss reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case_tools import (
    Net,
    Parts,
    add,
    case,
    labels,
    mlp,
)
from torch import Tensor, nn

# ---- losses ------------------------------


def on_mlp(loss: Callable[..., Tensor], targets: Callable[[], Any], out: int = 3, n: int = 4) -> Callable[[], Parts]:
    """A loss on the small MLP."""
    return lambda: (mlp(out=out), loss, torch.randn(n, 4), targets())


def on_maps(loss: Callable[..., Tensor], targets: Callable[[], Any]) -> Callable[[], Parts]:
    """A loss on outputs [3, 3, 2, 2]."""
    return lambda: (nn.Conv2d(2, 3, 2), loss, torch.randn(3, 2, 3, 3), targets())


def holes() -> Tensor:
    """Labels of which the first sample has none."""
    return torch.tensor([-100, 2, 0, 1])


def soft(*shape: int) -> Tensor:
    """Probabilities over dimension 1."""
    return torch.randn(shape).softmax(1)


W3 = torch.tensor([0.5, 2.0, 1.2], dtype=torch.float64)
MAP_HOLES = torch.tensor([[[0, 1], [2, -1]], [[-1, -1], [-1, -1]], [[2, 1], [-1, 0]]])
CE = nn.CrossEntropyLoss
BCE = nn.BCEWithLogitsLoss

for _name, _make in {
    "sum": on_mlp(CE(reduction="sum"), lambda: labels(4)),
    "weights": on_mlp(CE(weight=W3), lambda: labels(4)),
    "weights_sum": on_mlp(CE(weight=W3, reduction="sum"), lambda: labels(4)),
    "ignore": on_mlp(CE(), holes),
    "ignore_weights_smoothing": on_mlp(CE(weight=W3, label_smoothing=0.2), holes),
    "smoothing": on_mlp(CE(label_smoothing=0.1), lambda: labels(4)),
    "smoothing_sum": on_mlp(CE(label_smoothing=0.1, reduction="sum"), lambda: labels(4)),
    "soft": on_mlp(CE(), lambda: soft(4, 3)),
    "soft_weights_smoothing": on_mlp(CE(weight=W3, label_smoothing=0.1), lambda: soft(4, 3)),
    "maps_sum": on_maps(CE(reduction="sum"), lambda: labels(3, 2, 2)),
    "maps_ignore_weights": on_maps(CE(weight=W3, ignore_index=-1), lambda: MAP_HOLES.clone()),
    "maps_soft": on_maps(CE(), lambda: soft(3, 3, 2, 2)),
    "scaled": on_mlp(lambda f, t: 3 * F.cross_entropy(f, t), lambda: labels(4)),
    "divided_sum": on_mlp(lambda f, t: F.cross_entropy(f, t, reduction="sum") / len(t), lambda: labels(4)),
    "none_weighted": on_mlp(
        lambda f, t: (F.cross_entropy(f, t[0], reduction="none") * t[1]).sum(),
        lambda: (labels(4), torch.rand(4)),
    ),
    "log_softmax_nll": on_mlp(lambda f, t: F.nll_loss(f.log_softmax(1), t), lambda: labels(4)),
    "log_softmax_nll_weights": on_mlp(lambda f, t: F.nll_loss(F.log_softmax(f, -1), t, weight=W3.to(f)), holes),
    "by_hand": on_mlp(lambda f, t: (f.logsumexp(1) - f.gather(1, t[:, None])[:, 0]).mean(), lambda: labels(4)),
}.items():
    add(f"ce_{_name}", _make, "ambiguous_columns" if _name == "by_hand" else "", kind="ce")
for _name, _make in {
    "sum": on_mlp(nn.MSELoss(reduction="sum"), lambda: torch.randn(4, 3)),
    "maps": on_maps(nn.MSELoss(), lambda: torch.randn(3, 3, 2, 2)),
    "functional": on_mlp(F.mse_loss, lambda: torch.randn(4, 3)),
    "by_hand": on_mlp(lambda f, t: (f - t).square().sum(1).mean(), lambda: torch.randn(4, 3)),
    "half_sum": on_mlp(lambda f, t: 0.5 * F.mse_loss(f, t, reduction="sum"), lambda: torch.randn(4, 3)),
    "squeezed": lambda: (
        Net(lambda m, x: m.net(x).squeeze(1), net=mlp(out=1)),
        nn.MSELoss(),
        torch.randn(4, 4),
        torch.randn(4),
    ),
}.items():
    add(f"mse_{_name}", _make, kind="mse")
for _name, _make in {
    "mean": on_mlp(BCE(), lambda: torch.rand(4, 3).round()),
    "sum_pos_weight": on_mlp(BCE(pos_weight=W3, reduction="sum"), lambda: torch.rand(4, 3).round()),
    "weights_soft": on_mlp(BCE(weight=W3, pos_weight=W3.flip(0)), lambda: torch.rand(4, 3)),
    "maps": on_maps(BCE(), lambda: torch.rand(3, 3, 2, 2).round()),
    "one_output": lambda: (
        Net(lambda m, x: m.net(x)[:, 0], net=mlp(out=1)),
        BCE(),
        torch.randn(4, 4),
        torch.rand(4).round(),
    ),
    "sigmoid_in_loss": on_mlp(lambda f, t: F.binary_cross_entropy(f.sigmoid(), t), lambda: torch.rand(4, 3).round()),
}.items():
    add(f"bce_{_name}", _make, kind="bce")

add(
    "log_softmax_in_model",
    lambda: (nn.Sequential(*mlp(), nn.LogSoftmax(1)), nn.NLLLoss(), torch.randn(4, 4), labels(4)),
    kind="ce",
    logits=lambda m, x: m[:3](x),
    head=lambda f: f.log_softmax(1),
)
add(
    "sigmoid_in_model",
    lambda: (nn.Sequential(*mlp(), nn.Sigmoid()), nn.BCELoss(), torch.randn(4, 4), torch.rand(4, 3).round()),
    kind="bce",
    logits=lambda m, x: m[:3](x),
    head=torch.sigmoid,
)

for _name, _make in {
    "poisson": on_mlp(nn.PoissonNLLLoss(), lambda: torch.randint(5, (4, 3)).double()),
    "huber": on_mlp(nn.HuberLoss(delta=0.6), lambda: torch.randn(4, 3)),
    "log_cosh": on_mlp(lambda f, t: torch.log(torch.cosh(f - t)).sum(1).mean(), lambda: torch.randn(4, 3)),
    "l1": on_mlp(nn.L1Loss(), lambda: torch.randn(4, 3)),
    "kl_div": on_mlp(lambda f, t: F.kl_div(f.log_softmax(1), t, reduction="batchmean"), lambda: soft(4, 3)),
    "softmax_squares": on_mlp(lambda f: f.logsumexp(1).square().mean() + f.square().sum(), lambda: None),
    "quadratic_form": on_mlp(
        lambda f, t: torch.einsum("nc,cd,nd->", f - t, Q3.to(f), f - t), lambda: torch.randn(4, 3)
    ),
    "partial_read": on_mlp(lambda f, t: F.mse_loss(f[:, :2], t), lambda: torch.randn(4, 2)),
    "poisson_rate": on_mlp(
        lambda f, t: F.poisson_nll_loss(F.softplus(f), t, log_input=False), lambda: torch.randint(5, (4, 3)).double()
    ),
    "poisson_full_sum": on_mlp(
        lambda f, t: F.poisson_nll_loss(f, t, full=True, reduction="sum"), lambda: torch.randint(5, (4, 3)).double()
    ),
    "smooth_l1": on_mlp(lambda f, t: F.smooth_l1_loss(f, t, beta=0.7), lambda: torch.randn(4, 3)),
    "kl_div_mean": on_mlp(lambda f, t: F.kl_div(f.log_softmax(1), t, reduction="none").mean(), lambda: soft(4, 3)),
    "kl_div_log_target": on_mlp(
        lambda f, t: F.kl_div(f.log_softmax(1), t, reduction="sum", log_target=True), lambda: soft(4, 3).log()
    ),
    "hinge_embedding": on_mlp(F.hinge_embedding_loss, lambda: torch.randn(4, 3).sign()),
    "multi_margin": on_mlp(lambda f, t: F.multi_margin_loss(f, t), lambda: labels(4)),
    "multi_margin_squares": on_mlp(
        lambda f, t: F.multi_margin_loss(f, t, p=2, margin=0.7, weight=W3.to(f), reduction="sum"), lambda: labels(4)
    ),
    "multilabel_margin": on_mlp(
        lambda f, t: F.multilabel_margin_loss(f, t),
        lambda: torch.tensor([[0, -1, 1], [1, 2, -1], [2, -1, 0], [-1, 0, 1]]),
    ),
    "multilabel_soft_margin": on_mlp(F.multilabel_soft_margin_loss, lambda: torch.rand(4, 3).round()),
    "probabilities": on_mlp(
        lambda f, t: F.binary_cross_entropy(0.9 * f.sigmoid(), t, weight=W3.to(f)), lambda: torch.zeros(4, 3)
    ),
    "soft_margin": on_mlp(F.soft_margin_loss, lambda: torch.randn(4, 3).sign()),
}.items():
    add(f"loss_{_name}", _make, "ambiguous_columns")
Q3 = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 1.5]], dtype=torch.float64)
for _name, _make in {
    "sigmoid_mse": on_mlp(lambda f, t: F.mse_loss((3 * f).sigmoid(), t), lambda: torch.rand(4, 3).round()),
    "gaussian_nll": on_mlp(
        lambda f, t: (f[:, 1] + (f[:, 0] - t) ** 2 * torch.exp(-f[:, 1])).mean(), lambda: torch.randn(4)
    ),
    "negative_scale": on_mlp(lambda f, t: -2 * F.cross_entropy(f, t), lambda: labels(4)),
}.items():
    add(f"loss_{_name}", _make, "nonconvex ambiguous_columns")


@case(kind="ce", tags="regularised")
def loss_regularised() -> Parts:
    """An L2 penalty and a smooth non-quadratic one on the parameters, inside the loss."""
    model = mlp()

    def loss(f: Tensor, t: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(f, t) + 0.1 * penalty + 0.05 * model[0].weight.cosh().sum()

    return model, loss, torch.randn(4, 4), labels(4)


# ---- outputs of several leaves ------------------------------


@dataclasses.dataclass
class Output:
    """What a model of this kind returns: two heads and something that is no tensor."""

    logits: Tensor
    value: Tensor
    hidden: Tensor | None = None
    note: str = ""


def heads(pack: Callable[[Tensor, Tensor, Tensor], Any], loss: Callable[[Any, Any], Tensor]) -> Parts:
    """A trunk with two heads, packed into some structure."""

    def run(m: Any, x: Tensor) -> Any:
        h = torch.tanh(m.trunk(x))
        return pack(m.logits(h), m.value(h), h)

    model = Net(run, trunk=nn.Linear(3, 3), logits=nn.Linear(3, 3), value=nn.Linear(3, 2))
    return model, loss, torch.randn(3, 3), {"label": labels(3), "value": torch.randn(3, 2)}


def both(logits: Tensor, value: Tensor, t: Any) -> Tensor:
    """Cross-entropy on one head, squared error on the other."""
    return F.cross_entropy(logits, t["label"]) + 0.5 * F.mse_loss(value, t["value"])


def several(*parts: str) -> Net:
    """An MLP for each part, their outputs in a tuple."""
    return Net(lambda m, x: tuple(getattr(m, p)(x) for p in parts), **{p: mlp() for p in parts})


add(
    "output_auxiliary",
    lambda: heads(
        lambda a, b, h: (a, h),
        lambda o, t: F.cross_entropy(o[0], t["label"]) + 0.1 * F.mse_loss(o[1], torch.zeros_like(o[1])),
    ),
    "several_leaves ambiguous_columns",
)
for _name, _loss, _parts, _target, _tags in (
    ("margin_ranking", lambda o, t: F.margin_ranking_loss(*o, t, margin=0.5), "ab", lambda: torch.randn(4, 3).sign(), ""),
    ("gaussian_nll", lambda o, t: F.gaussian_nll_loss(o[0], t, o[1].exp()), "ab", lambda: torch.randn(4, 3), "nonconvex"),
    (
        "gaussian_nll_full", lambda o, t: F.gaussian_nll_loss(o[0], t, F.softplus(o[1]), full=True, reduction="sum"), "ab",
        lambda: torch.randn(4, 3), "nonconvex",
    ),
    ("product", lambda o, t: (o[0] * o[1] - t).square().mean(), "ab", lambda: torch.randn(4, 3), "nonconvex"),
    ("triplet", lambda o, t: F.triplet_margin_loss(*o) + 0 * t.sum(), "abc", lambda: torch.randn(4), "nonconvex"),
    (
        "cosine_embedding", lambda o, t: F.cosine_embedding_loss(*o, t, margin=-0.9), "ab",
        lambda: torch.tensor([1.0, -1.0, 1.0, -1.0]), "nonconvex",
    ),
):  # fmt: skip
    add(
        f"output_{_name}",
        lambda loss=_loss, parts=_parts, target=_target: (several(*parts), loss, torch.randn(4, 4), target()),
        f"several_leaves ambiguous_columns {_tags}",
    )
add(
    "output_tuple",
    lambda: heads(lambda a, b, h: (a, b), lambda o, t: both(o[0], o[1], t)),
    "several_leaves ambiguous_columns",
)
add(
    "output_dict",
    lambda: heads(lambda a, b, h: {"a": a, "b": b}, lambda o, t: both(o["a"], o["b"], t)),
    "several_leaves ambiguous_columns",
)
add(
    "output_dataclass",
    lambda: heads(lambda a, b, h: Output(a, b, None, "two"), lambda o, t: both(o.logits, o.value, t)),
    "several_leaves ambiguous_columns",
)
add(
    "output_dataclass_one_read",
    lambda: heads(lambda a, b, h: Output(a, b, h, "one"), lambda o, t: F.cross_entropy(o.logits, t["label"])),
    kind="ce",
)
add(
    "output_coupled",
    lambda: heads(
        lambda a, b, h: (a, b),
        lambda o, t: (o[0][:, :2] + o[1] - t["value"]).square().mean() + 0.1 * math.pi * o[0].square().sum(),
    ),
    "several_leaves ambiguous_columns",
)
