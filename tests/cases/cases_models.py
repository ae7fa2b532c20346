"""Cases by wiring: fully connected, tied and derived weights, functional models, inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case_tools import (
    Net,
    Parts,
    add,
    case,
    classify,
    flat_cross_entropy,
    labels,
    mlp,
    param,
    regress,
    stack,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

# ---- fully connected ------------------------------

add("logistic_regression", lambda: classify(nn.Linear(4, 3), 4), kind="ce")
add("linear_regression", lambda: regress(nn.Linear(4, 2), 4), kind="mse")
add("mlp_relu", lambda: classify(mlp(nn.ReLU()), 4), kind="ce")
add("mlp_gelu", lambda: classify(mlp(nn.GELU()), 4), kind="ce")
add("mlp_prelu", lambda: classify(mlp(nn.PReLU(5)), 4), kind="ce")
add(
    "mlp_deep_nobias",
    lambda: regress(
        nn.Sequential(
            nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 3, bias=False), nn.SiLU(), nn.Linear(3, 2)
        ),
        3,
    ),
    kind="mse",
)
add("mlp_sequence", lambda: regress(mlp(out=2), 3, 4), kind="mse")
add("mlp_single_sample", lambda: classify(mlp(), 4, n=1), kind="ce")


def activations(*acts: Callable[[Tensor], Tensor]) -> Parts:
    """One linear layer, every activation on it, one linear layer."""
    model = Net(
        lambda m, x: m.last(torch.cat([act(m.first(x)) for act in acts], -1)),
        first=nn.Linear(3, 4),
        last=nn.LazyLinear(3),
    )
    model(torch.randn(2, 3))
    return classify(model, 3)


add(
    "activations_smooth",
    lambda: activations(
        torch.tanh,
        torch.sigmoid,
        F.softplus,
        F.logsigmoid,
        F.silu,
        F.gelu,
        F.mish,
        F.softsign,
        F.tanhshrink,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    ),
    kind="ce",
)
add(
    "activations_pieces",
    lambda: activations(
        F.relu,
        F.leaky_relu,
        F.elu,
        F.selu,
        F.celu,
        F.relu6,
        F.hardtanh,
        F.hardswish,
        F.hardshrink,
        F.softshrink,
        lambda x: F.elu(x, alpha=0.5),
        lambda x: F.threshold(x, 0.1, -0.2),
    ),
    kind="ce",
)
add("hardsigmoid", lambda: activations(F.hardsigmoid, torch.tanh), "no_hessian", kind="ce")
add(
    "activations_joint",
    lambda: activations(F.glu, lambda x: x.softmax(-1), lambda x: x.log_softmax(-1), lambda x: F.softmin(x, -1)),
    kind="ce",
)
add(
    "pointwise_ops",
    lambda: activations(
        torch.exp,
        torch.sin,
        torch.cos,
        torch.atan,
        torch.erf,
        torch.square,
        lambda x: (x - 0.05).abs(),
        torch.neg,
        torch.sinh,
        lambda x: (1 + x * x).sqrt(),
        lambda x: (1 + x * x).log(),
        lambda x: (1 + x * x).rsqrt(),
        lambda x: x**3,
        lambda x: 1 / (2 + x.tanh()),
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: torch.where(x > 0.05, x * x, -x),
    ),
    kind="ce",
)

# ---- weights with several uses, or that reach their op through other ops ------------------------------


@case(kind="mse")
def layer_called_twice() -> Parts:
    return regress(
        Net(
            lambda m, x: m.last(torch.tanh(m.layer(torch.tanh(m.layer(x))))),
            layer=nn.Linear(3, 3),
            last=nn.Linear(3, 2),
        ),
        3,
    )


@case(kind="ce")
def conv_called_twice() -> Parts:
    return classify(
        Net(
            lambda m, x: m.last(torch.tanh(m.conv(F.relu(m.conv(x)))).flatten(1)),
            conv=nn.Conv2d(2, 2, 2),
            last=nn.Linear(8, 3),
        ),
        2,
        4,
        4,
        n=3,
    )


@case(kind="mse")
def weight_in_two_kinds() -> Parts:
    """One weight in a linear layer, transposed in another, and elementwise."""
    return regress(Net(lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w.t()) * m.w.sum(0), w=param(4, 3)), 3)


@case(kind="ce", class_dim=-1, tags="ambiguous_columns")
def tied_embedding_lm() -> Parts:
    """Tokens [N, T] -> logits [N, T, vocabulary], the head tied to the embedding."""
    emb, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = emb.weight
    model = Net(lambda m, t: m.head(torch.tanh(m.mix(m.emb(t)))), emb=emb, mix=nn.Linear(4, 4), head=head)
    return model, flat_cross_entropy, labels(3, 3, classes=5), labels(3, 3, classes=5)


@case(kind="ce")
def embedding_padding() -> Parts:
    model = Net(lambda m, t: m.head(m.emb(t).mean(1)), emb=nn.Embedding(6, 3, padding_idx=0), head=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.tensor([[1, 2, 0], [3, 3, 1], [5, 0, 0]]), labels(3)


add(
    "weight_norm_linear",
    lambda: classify(nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)), 4),
    kind="ce",
)
add("weight_norm_conv", lambda: stack(weight_norm(nn.Conv2d(1, 2, 2)), shape=(1, 3, 3)), kind="ce")
add(
    "spectral_norm",
    lambda: classify(nn.Sequential(spectral_norm(nn.Linear(4, 3)), nn.Tanh()).eval(), 4),
    kind="ce",
)


@case(kind="ce")
def low_rank_adapter() -> Parts:
    """W + B A with W frozen."""
    base = nn.Linear(4, 3).requires_grad_(False)
    return classify(
        Net(
            lambda m, x: m.head(torch.tanh(F.linear(x, m.base.weight + m.b @ m.a, m.base.bias))),
            base=base,
            a=param(2, 4),
            b=param(3, 2),
            head=nn.Linear(3, 3),
        ),
        4,
    )


@case(kind="ce")
def low_rank_branch() -> Parts:
    """base(x) + up(down(x)) with the base frozen."""
    base = nn.Linear(4, 3).requires_grad_(False)
    return classify(
        Net(
            lambda m, x: m.base(x) + 2.0 * m.up(m.down(x)),
            base=base,
            down=nn.Linear(4, 2, bias=False),
            up=nn.Linear(2, 3, bias=False),
        ),
        4,
    )


class Symmetric(nn.Module):
    """A parametrization: the upper triangle, mirrored."""

    def forward(self, w: Tensor) -> Tensor:
        """W [d, d] -> [d, d]."""
        return w.triu() + w.triu(1).mT


@case(kind="mse")
def symmetric_weight() -> Parts:
    layer = nn.Linear(3, 3)
    register_parametrization(layer, "weight", Symmetric())
    return regress(nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2)), 3)


@case(kind="mse")
def weight_prefixes() -> Parts:
    """Weights sliced, permuted, expanded, concatenated, masked and cast on their way to their op."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k = m.joint[:3], m.joint[3:]
        h = F.linear(x, q) * F.linear(x, k, m.scalar.expand(3))
        h = F.linear(h, torch.cat([m.top, m.bottom.permute(1, 0)]) * m.mask)
        return h @ F.softplus(m.positive).to(x.dtype)

    return regress(
        Net(
            run,
            joint=param(6, 3),
            scalar=param(1),
            top=param(1, 3),
            bottom=param(3, 2),
            mask=torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]]),
            positive=param(3, 2),
        ),
        3,
    )


@case(kind="mse")
def sample_free_network() -> Parts:
    """A weight generated by a network that no sample enters."""

    def run(m: Any, x: Tensor) -> Tensor:
        return x @ m.maker(m.codes) + torch.tanh(m.shift).sum()

    maker = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    return regress(Net(run, codes=param(3, 2), maker=maker, shift=param(2)), 3)


# ---- functional models ------------------------------


@case(kind="mse")
def functional_einsum() -> Parts:
    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("nti,hio->nhto", x, m.heads))
        return torch.einsum("nhto,ho->nt", h, m.out) + m.bias

    return regress(Net(run, heads=param(2, 3, 2), out=param(2, 2), bias=param(1)), 3, 3)


@case(kind="ce")
def functional_matmul() -> Parts:
    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(x @ m.w + m.b)
        h = torch.addmm(m.c, h, m.v) / (1 + m.scale**2) - m.shift
        return torch.mm(h, m.u.t()).mul(m.scale)

    return classify(
        Net(
            run,
            w=param(4, 3),
            b=param(3),
            v=param(3, 3),
            c=param(3),
            scale=param(1),
            shift=param(3),
            u=param(3, 3),
        ),
        4,
    )


@case(kind="mse")
def functional_bmm() -> Parts:
    """Weights batched over heads; the batch is the second dimension of a bmm's operand."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.bmm(x.movedim(1, 0), m.w)
        return torch.baddbmm(m.c, torch.sigmoid(h), m.v).movedim(0, 1)

    return regress(Net(run, w=param(2, 3, 2), v=param(2, 2, 2), c=param(2, 1, 2)), 2, 3)


@case(kind="mse")
def no_grad_region() -> Parts:
    """A statistic of the activations, and a scale of the parameters, that no gradient flows through."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))
        with torch.no_grad():
            size = h.square().mean(1, keepdim=True).sqrt()
            scale = m.last.weight.norm()
        return m.last(h / size) / scale + h.detach()[:, :2]

    return regress(Net(run, first=nn.Linear(3, 4), last=nn.Linear(4, 2)), 3)


@case(kind="ce")
def frozen_parameters() -> Parts:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    return classify(model, 4)


@case(kind="ce")
def unreached_parameter() -> Parts:
    """One layer never called, one whose output is dropped."""

    def run(m: Any, x: Tensor) -> Tensor:
        m.dropped(x)
        return m.used(x)

    return classify(Net(run, used=nn.Linear(4, 3), dropped=nn.Linear(4, 2), never=nn.Linear(2, 2), raw=param(2)), 4)


@case(kind="ce")
def shape_ops() -> Parts:
    """Padding, split, chunk, stack, unbind, getitem, roll, flip, squeeze, repeat, products of activations."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        a, b = F.pad(h, (1, 1)).split([3, 3], 1)
        c, d = h.chunk(2, dim=-1)
        e = torch.stack([a, b.flip(1)], 1) * b.softmax(-1).unsqueeze(1)
        f, g = e.unbind(1)
        pieces = [f, g[:, 1:], h[:, ::2], h[..., -1:], c.repeat(1, 2), d.roll(1, 1), h[:, [3, 0, 0]]]
        return m.last(torch.cat(pieces, 1))

    return classify(Net(run, first=nn.Linear(3, 4), last=nn.Linear(17, 3)), 3)


@case(kind="mse")
def reduction_ops() -> Parts:
    """Reductions over all but the batch, scans, sorting, masks, gather."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        index = torch.tensor([1, 0, 3]).expand(len(x), -1)
        parts = [
            h.sum(1, keepdim=True),
            h.mean(-1, True),
            h.amax(1, keepdim=True),
            h.var(1, keepdim=True),
            h.norm(dim=1, keepdim=True),
            h.logsumexp(1, keepdim=True),
            h.prod(1, keepdim=True),
            h.cumsum(1),
            h.logcumsumexp(1),
            h.sort(1).values,
            h.masked_fill(x.sum(1, keepdim=True) > 0, 0.3),
            h.gather(1, index),
            torch.maximum(h, h.tanh()),
            h.max(1).values[:, None],
        ]
        return m.last(torch.cat(parts, 1))

    return regress(Net(run, first=nn.Linear(3, 4), last=nn.Linear(31, 2)), 3)


@case(kind="mse")
def merged_dims() -> Parts:
    """Samples inside a merged dimension: view(N*T, D), and view(T, N*H, D) as in attention."""

    def run(m: Any, x: Tensor) -> Tensor:
        n, t, d = x.shape
        h = torch.tanh(m.first(x.reshape(n * t, d))).view(n, t, 4).transpose(0, 1)
        h = h.reshape(t, n * 2, 2).transpose(0, 1)
        h = torch.bmm(torch.bmm(h, h.mT), h).transpose(0, 1).reshape(t, n, 4).transpose(0, 1)
        return m.last(h.reshape(n * t, 4)).view(n, t)

    return regress(Net(run, first=nn.Linear(2, 4), last=nn.Linear(4, 1)), 3, 2)


@case(kind="mse")
def standardised_inputs() -> Parts:
    """Statistics of the batch that depend on no parameter: samples do not interact."""
    return regress(Net(lambda m, x: m.layer((x - x.mean(0)) / x.std(0)), layer=mlp(out=2)), 4, n=4)


@case(kind="ce")
def own_slices() -> Parts:
    """Lookups at [arange(N), i]: the last position that counts, from behind, and several positions and features."""

    def run(m: Any, x: Tensor, last: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0])
        h = torch.tanh(m.first(x))
        pair = h[rows[:, None], torch.stack([last, last - 1], 1), torch.tensor([0, -1])]
        return m.head(torch.cat([h[rows, last], h[rows, -1], pair], 1))

    model = Net(run, first=nn.Linear(2, 3), head=nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(3, 4, 2), torch.tensor([3, 1, 2])), labels(3)


# ---- several inputs, other batch dimensions ------------------------------


@case(kind="ce")
def inputs_tuple() -> Parts:
    """Tokens and features."""
    model = Net(
        lambda m, t, x: m.head(torch.tanh(m.emb(t) + m.feature(x))),
        emb=nn.Embedding(4, 3),
        feature=nn.Linear(2, 3),
        head=nn.Linear(3, 3),
    )
    return model, nn.CrossEntropyLoss(), (labels(4, classes=4), torch.randn(4, 2)), labels(4)


@case(kind="mse")
def inputs_dict() -> Parts:
    model = Net(
        lambda m, x, scale, mask=None: m.head(torch.tanh(m.first(x)) * scale[:, None] * mask),
        first=nn.Linear(3, 3),
        head=nn.Linear(3, 2),
    )
    inputs = {"x": torch.randn(3, 3), "mask": (torch.rand(3, 3) > 0.3).double(), "scale": torch.rand(3)}
    return model, nn.MSELoss(), inputs, torch.randn(3, 2)


@case(kind="mse", batch_dim=(0, None))
def inputs_shared() -> Parts:
    """The second input is without samples."""
    model = Net(
        lambda m, x, codes: torch.tanh(m.first(x)) @ m.second(codes).t(),
        first=nn.Linear(3, 2),
        second=nn.Linear(4, 2),
    )
    return model, nn.MSELoss(), (torch.randn(3, 3), torch.randn(2, 4)), torch.randn(3, 2)


@case(kind="mse", batch_dim=1, out_dim=1)
def batch_second() -> Parts:
    """[T, N, D] in and out."""
    return mlp(out=2), nn.MSELoss(), torch.randn(2, 3, 4), torch.randn(2, 3, 2)


# ---- axes that are not the usual ones ------------------------------


@case(kind="mse")
def parameters_per_sample() -> Parts:
    """Parameters with an axis that meets the samples': by a rule, and by the general fallback."""
    model = Net(
        lambda m, x: torch.bmm(torch.hypot(x, m.shift).unsqueeze(1), m.maps).squeeze(1),
        shift=param(3, 3),
        maps=param(3, 3, 2),
    )
    return regress(model, 3)


@case(kind="mse")
def vectors_in_layers() -> Parts:
    """Linear layers of a vector and with a vector for a weight, a convolution of one image, a scalar's transpose."""
    model = Net(
        lambda m, x: (
            F.linear(x, m.v).unsqueeze(1) * m.scale.t() + F.linear(m.z, m.w) + F.conv2d(m.image, m.filter).mean()
        ),
        v=param(3),
        w=param(2, 4),
        z=param(4),
        scale=param(),
        image=param(2, 3, 3),
        filter=param(3, 2, 2, 2),
    )
    return regress(model, 3)
