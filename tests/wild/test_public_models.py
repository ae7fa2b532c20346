"""Models that people brought to BackPACK, Opacus, curvlinops, laplace, functorch and transformers, as rows of a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net, flat_cross_entropy, param
from situations import Refused, Situation, classes, numbers, together
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from fxcurv.errors import MixedSamplesError

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


# ---- forward passes that are more than an expression ------------------------------


def residual(m: Any, x: Tensor) -> Tensor:
    h = m.norm(m.first(x))
    h = F.relu_(m.second(F.relu_(h)) + h)
    return m.head(m.pool(h).flatten(1))


def u_net(m: Any, x: Tensor) -> Tensor:
    above = F.silu(m.norm(m.down(x)))
    below = F.silu(m.bottom(F.max_pool2d(above, 2)))
    return m.head(torch.cat([above, m.up(below)], 1))


def rendered(m: Any, rays: Tensor) -> Tensor:
    out = m.field(rays)  # [N, points, 4]
    density, colour = F.softplus(out[..., :1]), torch.sigmoid(out[..., 1:])
    return (density / density.sum(1, keepdim=True) * colour).sum(1)


def intermediates(m: Any, x: Tensor) -> Tensor:
    found = []
    for layer in m.layers:
        x = torch.tanh(layer(x))
        found.append(m.norm(x))
    return m.head(torch.stack(found).mean(0))


def with_positions(m: Any, words: Tensor) -> Tensor:
    positions = torch.arange(words.shape[1]).unsqueeze(0)
    return m.head(torch.tanh(m.words(words) + m.positions(positions)).mean(1))


def skip_gram(m: Any, target: Tensor, context: Tensor, negative: Tensor) -> Tensor:
    v, u, noise = m.targets(target), m.contexts(context), m.contexts(negative)
    seen = F.logsigmoid((u * v).sum(1))
    unseen = F.logsigmoid(-torch.bmm(noise, v.unsqueeze(2)).squeeze(2)).sum(1)
    return torch.stack([seen, unseen], 1)


def augmented(m: Any, images: Tensor) -> Tensor:
    n, a = images.shape[:2]
    return m.head(torch.tanh(m.conv(images.flatten(0, 1))).flatten(1)).view(n, a, -1).mean(1)


def own_layer_norm(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    mean = h.mean(-1, keepdim=True)
    spread = (h - mean).pow(2).mean(-1, keepdim=True)
    return m.head(torch.tanh(m.weight * (h - mean) / torch.sqrt(spread + 1e-12) + m.bias))


def conv_next(m: Any, x: Tensor) -> Tensor:
    h = m.depthwise(x).permute(0, 2, 3, 1)
    h = m.out(F.gelu(m.wide(m.norm(h)))) * m.gamma
    return m.head((x + h.permute(0, 3, 1, 2)).mean((2, 3)))


def vit(m: Any, x: Tensor) -> Tensor:
    patches = m.patch(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([m.token.expand(len(x), -1, -1), patches], 1) + m.positions
    return m.head(m.block(tokens)[:, 0])


def decaying(m: Any, x: Tensor) -> Tensor:
    """Attention that decays with a distance, computed without gradient from the attention itself, and a learned rate."""
    q, k, v = m.mix(x).chunk(3, -1)
    scores = q @ k.mT / 2
    hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    with torch.no_grad():
        p = scores.masked_fill(hidden, -1e32).softmax(-1).masked_fill(hidden, 0)
        left = p.sum(-1, keepdim=True) - p.cumsum(-1)
        steps = torch.arange(x.shape[1]).to(x)
        distance = (left * (steps[:, None] - steps).abs()).clamp(min=0).sqrt().detach()
    effect = torch.clamp((distance * -F.softplus(m.rate)).exp(), min=1e-5, max=1e5)
    return m.head(((scores * effect).masked_fill(hidden, -1e32).softmax(-1) @ v).mean(1))


def relative(m: Any, x: Tensor) -> Tensor:
    """Two layers that share the bias of the first one, looked up by clipped distance."""
    steps = torch.arange(x.shape[1])
    bias = m.table((steps[None] - steps[:, None]).clamp(-2, 2) + 2).permute(2, 0, 1).unsqueeze(0)
    for layer in (m.first, m.second):
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in layer(x).chunk(3, -1))
        x = x + ((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return m.head(x.mean(1))


def left_padded(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Masks of the least number that the dtype has, whose sum overflows where both hide an entry."""
    least = torch.finfo(x.dtype).min
    causal = torch.full((x.shape[1], x.shape[1]), least, dtype=x.dtype).triu(1)
    padding = ((1 - mask) * least)[:, None]
    bias = (causal + padding).clamp(min=least)
    q, k, v = m.mix(x).chunk(3, -1)
    h = (q @ k.mT + bias).softmax(-1) @ v
    return m.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def causal_by_hand(m: Any, x: Tensor) -> Tensor:
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf"))
    steps = torch.arange(x.shape[1])
    mask = mask.clone().masked_fill_(steps < (steps + 1).view(-1, 1), 0)
    q, k, v = m.mix(x).chunk(3, -1)
    return m.head((q @ k.mT + mask.to(x)).softmax(-1) @ v)


def last_word(m: Any, words: Tensor) -> Tensor:
    last = ((words != 0) * torch.arange(words.shape[1])).argmax(-1)
    logits = m.head(torch.tanh(m.words(words)))
    return logits[torch.arange(len(words)), last]


def experts(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    weights = m.router(x).softmax(-1)
    every = torch.stack([torch.tanh(e(x)) for e in m.experts], 1)
    return m.head((weights.unsqueeze(-1) * every).sum(1)), weights


def balanced(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    logits, weights = out
    return F.cross_entropy(logits, y) + 0.1 * len(weights.T) * weights.mean(0).square().sum()


def packed(m: Any, x: Tensor) -> Tensor:
    lengths = torch.full((len(x),), 2)
    return m.head(m.cell(pack_padded_sequence(x, lengths, batch_first=True))[1][0][-1])


class XSoftmax(torch.autograd.Function):
    """A softmax that is zero where a mask is, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        out = x.masked_fill(mask, torch.finfo(x.dtype).min).softmax(-1).masked_fill(mask, 0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return out * (g - (g * out).sum(-1, keepdim=True)), None


def masked_attention(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.mix(x).chunk(3, -1)
    return m.head((XSoftmax.apply(q @ k.mT, mask.bool()[:, None].expand(-1, x.shape[1], -1)) @ v).mean(1))


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def attends(run: Any, **parts: nn.Module) -> nn.Module:
    return Net(run, mix=nn.Linear(4, 12), head=nn.Linear(4, 3), **parts)


def padding(n: int) -> Tensor:
    mask = torch.ones(n, 4)
    mask[0, :2] = 0
    return mask


def tied() -> nn.Module:
    words = nn.Embedding(5, 3)
    head = nn.Linear(3, 5, bias=False)
    head.weight = words.weight
    return Net(lambda m, t: m.head(torch.tanh(m.mix(m.words(t)))), words=words, mix=nn.Linear(3, 3), head=head)


def frozen_body() -> nn.Module:
    model = mlp(4, 5, 3)
    model[0].requires_grad_(False)
    return model


def res_net() -> nn.Module:
    return Net(
        residual,
        first=nn.Conv2d(1, 2, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(2),
        second=nn.Conv2d(2, 2, 3, padding=1),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(2, 3),
    )


def recurrent(cell: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    return Net(
        lambda m, x: m.head(m.drop(m.norm(m.cell(x)[0][:, -1]))),
        cell=cell,
        norm=norm or nn.Identity(),
        drop=nn.Dropout(0.3),
        head=nn.Linear(3, 1),
    )


MODELS = {
    # ---- BackPACK
    "residual block with in-place rectifiers and evaluated batch norm": Situation(
        "f-dangel/backpack#149", res_net, CE, numbers(1, 4, 4), classes(), quick=True
    ),
    "products with a residual net, evaluated": Situation(
        "f-dangel/backpack#322", res_net, CE, numbers(1, 4, 4), classes(), "products",
    ),
    "residual block in training mode": Situation(
        "f-dangel/backpack#149", res_net, CE, numbers(1, 4, 4), classes(), "first", trains=True,
        refused=Refused(MixedSamplesError, "module 'norm'", ("BatchGrad", "eval()")),
    ),
    "one number that scales": Situation(
        "f-dangel/backpack#152", lambda: Net(lambda m, x: m.w * m.b(x), w=param(1), b=mlp(4, 5, 3)), MSE,
        numbers(4), numbers(3), "first ggn hessian",
    ),
    "convolution and deconvolution": Situation(
        "f-dangel/backpack#219",
        lambda: Net(
            lambda m, x: torch.sigmoid(m.up(torch.relu(m.down(x)))),
            down=nn.Conv2d(1, 2, 3, stride=2),
            up=nn.ConvTranspose2d(2, 1, 3, stride=2, output_padding=1),
        ),
        MSE, numbers(1, 6, 6), numbers(1, 6, 6), "first ggn",
    ),
    "weighted sum along a ray": Situation(
        "f-dangel/backpack#321", lambda: Net(rendered, field=mlp(3, 5, 4)), MSE, numbers(4, 3), numbers(3), quick=True,
    ),
    "U-Net with group norm": Situation(
        "f-dangel/backpack#328",
        lambda: Net(
            u_net,
            down=nn.Conv2d(1, 2, 3, padding=1, bias=False),
            norm=nn.GroupNorm(2, 2),
            bottom=nn.Conv2d(2, 2, 1),
            up=nn.ConvTranspose2d(2, 2, 2, stride=2),
            head=nn.Conv2d(4, 2, 1),
        ),
        CE, numbers(1, 2, 2), classes(2, 2, of=2), "first ggn products",
    ),
    "KFLR of a residual net": Situation(
        "f-dangel/backpack#235", lambda: Net(lambda m, x: m.h(x + m.b(m.a(x).relu())), a=nn.Linear(4, 4), b=nn.Linear(4, 4),
        h=nn.Linear(4, 3)), CE, numbers(4), classes(), "kron ggn",
    ),
    "Hessian diagonal of a residual net": Situation(
        "f-dangel/backpack#344", lambda: Net(lambda m, x: m.h(x + m.b(m.a(x).sigmoid())), a=nn.Linear(4, 4),
        b=nn.Linear(4, 4), h=nn.Linear(4, 3)), CE, numbers(4), classes(), "hessian hessian_batch", quick=True,
    ),
    "LSTM, its last state": Situation(
        "f-dangel/backpack#16", lambda: recurrent(nn.LSTM(2, 3, batch_first=True)), MSE, numbers(2, 2), numbers(1), trains=True,
    ),
    # ---- Opacus
    "one layer norm for all intermediate states": Situation(
        "meta-pytorch/opacus#578",
        lambda: Net(intermediates, layers=nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]), norm=nn.LayerNorm(4),
        head=nn.Linear(4, 3)), CE, numbers(4), classes(), quick=True,
    ),
    "a layer that is declared and never used": Situation(
        "meta-pytorch/opacus#502",
        lambda: Net(lambda m, x: m.a(x), a=mlp(4, 5, 3), unused=nn.Linear(2, 2)), CE, numbers(4), classes(),
    ),
    "a list of parts and one of several heads": Situation(
        "meta-pytorch/opacus#645",
        lambda: Net(lambda m, x: m.heads[-1](m.parts[1](m.parts[0](x).relu()).flatten(1)),
        parts=nn.ModuleList([nn.Conv1d(1, 2, 2), nn.MaxPool1d(2)]), heads=nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])),
        CE, numbers(1, 5), classes(),
    ),
    "position table looked up once for the batch": Situation(
        "meta-pytorch/opacus#841",
        lambda: Net(with_positions, words=nn.Embedding(5, 3), positions=nn.Embedding(4, 3), head=nn.Linear(3, 3)),
        CE, classes(4, of=5), classes(), quick=True,
    ),
    "words and head are one weight": Situation(
        "meta-pytorch/opacus#413", tied, flat_cross_entropy, classes(3, of=5), classes(3, of=5), oracle={"kind": "ce",
        "class_dim": 2},
    ),
    "GRU, its last state": Situation(
        "meta-pytorch/opacus#783", lambda: recurrent(nn.GRU(2, 3, batch_first=True)), MSE, numbers(2, 2), numbers(1), "first ggn",
        trains=True,
    ),
    "dilated convolution with a stride": Situation(
        "meta-pytorch/opacus#137", lambda: nn.Sequential(nn.Conv2d(1, 2, 2, stride=2, dilation=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(8, 3)), CE, numbers(1, 4, 4), classes(),
    ),
    "padding said as a word": Situation(
        "meta-pytorch/opacus#450", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Tanh(),
        nn.Conv2d(2, 2, 3, padding="valid"), nn.Flatten(), nn.Linear(8, 3)), CE, numbers(1, 4, 4), classes(), "first ggn",
    ),
    "depthwise and pointwise": Situation(
        "meta-pytorch/opacus#78", lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1),
        nn.Flatten(), nn.Linear(8, 3)), CE, numbers(2, 3, 3), classes(),
    ),
    "word vectors with negative samples": Situation(
        "meta-pytorch/opacus#89", lambda: Net(skip_gram, targets=nn.Embedding(5, 3), contexts=nn.Embedding(5, 3)),
        lambda f: -f.sum(1).mean(), together(classes(of=5), classes(of=5), classes(2, of=5)), None, "first hessian", quick=True,
    ),
    "several augmentations of an image are a sample": Situation(
        "meta-pytorch/opacus#245", lambda: Net(augmented, conv=nn.Conv2d(1, 2, 2), head=nn.Linear(8, 3)), CE,
        numbers(2, 1, 3, 3), classes(), quick=True,
    ),
    "attention over sequences first": Situation(
        "meta-pytorch/opacus#158",
        lambda: Net(lambda m, x: m.head(m.attention(x, x, x)[0].sum(0)), attention=nn.MultiheadAttention(4, 2),
        head=nn.Linear(4, 3)), CE, lambda n: torch.randn(3, n, 4), classes(), options={"batch_dim": 1},
    ),
    "attention with a mask, batches first": Situation(
        "meta-pytorch/opacus#774",
        lambda: Net(lambda m, x: m.head(m.attention(x, x, x, attn_mask=m.mask)[0].sum(1)),
        attention=nn.MultiheadAttention(4, 2, batch_first=True), mask=torch.ones(3, 3).triu(1).bool(), head=nn.Linear(4, 3)),
        CE, numbers(3, 4), classes(),
    ),
    "layer norm written by hand": Situation(
        "meta-pytorch/opacus#100", lambda: Net(own_layer_norm, body=nn.Linear(4, 5), weight=param(5), bias=param(5),
        head=nn.Linear(5, 3)), CE, numbers(4), classes(), quick=True,
    ),
    "a block that scales its branch by a parameter": Situation(
        "meta-pytorch/opacus#462",
        lambda: Net(conv_next, depthwise=nn.Conv2d(2, 2, 3, padding=1, groups=2), norm=nn.LayerNorm(2), wide=nn.Linear(2, 4),
        out=nn.Linear(4, 2), gamma=param(2), head=nn.Linear(2, 3)), CE, numbers(2, 3, 3), classes(), "first ggn",
    ),
    "a class token and positions that are parameters": Situation(
        "meta-pytorch/opacus#239",
        lambda: Net(vit, patch=nn.Conv2d(1, 4, 2, stride=2), token=param(1, 1, 4), positions=param(1, 5, 4),
        block=nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True), head=nn.Linear(4, 3)), CE,
        numbers(1, 4, 4), classes(), "first ggn",
    ),
    "attention that decays at a learned rate": Situation(
        "meta-pytorch/opacus#639", lambda: attends(decaying, rate=param(1)), CE, numbers(4, 4), classes(), quick=True,
    ),
    "spectral norm, evaluated": Situation(
        "meta-pytorch/opacus#646", lambda: nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), CE,
        numbers(4), classes(),
    ),
    "spectral norm in training mode": Situation(
        "meta-pytorch/opacus#646", lambda: nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), CE,
        numbers(4), classes(), "first", trains=True,
    ),
    "packed sequences": Situation(
        "meta-pytorch/opacus#103", lambda: Net(packed, cell=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 3)), CE,
        numbers(3, 2), classes(), "first",
    ),
    # ---- laplace
    "a network of convolutions for images": Situation(
        "aleximmer/Laplace#113", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1)),
        MSE, numbers(1, 3, 3), numbers(1, 3, 3),
    ),
    "recurrent regression with dropout and batch norm": Situation(
        "aleximmer/Laplace#143", lambda: recurrent(nn.LSTM(2, 3, 2, batch_first=True), nn.BatchNorm1d(3)), MSE, numbers(2, 2),
        numbers(1), "first ggn",
    ),
    "recurrent regression with dropout, training": Situation(
        "aleximmer/Laplace#143", lambda: recurrent(nn.LSTM(2, 3, batch_first=True)), MSE, numbers(2, 2), numbers(1), "first ggn",
        trains=True,
    ),
    "a model that is no Sequential": Situation(
        "aleximmer/Laplace#92", lambda: Net(lambda m, x: m.b(F.tanh(m.a(x))), a=nn.Linear(1, 5), b=nn.Linear(5, 1)), MSE,
        numbers(1), numbers(1), "first ggn hessian kron", quick=True,
    ),
    "LeNet's KFLR": Situation(
        "aleximmer/Laplace#76", lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3)), CE,
        numbers(1, 3, 3), classes(), "kron ggn",
    ),
    "some of the parameters": Situation(
        "aleximmer/Laplace#144", frozen_body, CE, numbers(4), classes(), "first ggn hessian kron",
    ),
    # ---- curvlinops
    "outputs at every position": Situation(
        "f-dangel/curvlinops#62", lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        lambda f, y: F.cross_entropy(f.transpose(1, 2), y), numbers(2, 4), classes(2), "first ggn hessian",
    ),
    "layers without a bias": Situation(
        "f-dangel/curvlinops#48", lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        CE, numbers(4), classes(), "kron ggn",
    ),
    # ---- transformers
    "a bias by distance that two layers share": Situation(
        "huggingface/transformers#13397", lambda: Net(relative, table=nn.Embedding(5, 2), first=nn.Linear(4, 12),
        second=nn.Linear(4, 12), head=nn.Linear(4, 3)), CE, numbers(3, 4), classes(), "first ggn",
    ),
    "padding on the left and masks that overflow": Situation(
        "huggingface/transformers#27114", lambda: attends(left_padded), CE, together(numbers(4, 4), padding), classes(),
        quick=True,
    ),
    "a causal mask filled in place": Situation(
        "huggingface/transformers#35291", lambda: attends(causal_by_hand), lambda f, y: F.cross_entropy(f.flatten(0, 1),
        y.flatten()), numbers(3, 4), classes(3),
    ),
    "a block that is computed again in the backward pass": Situation(
        "huggingface/transformers#6564",
        lambda: Net(lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)), body=mlp(4, 4, 4), head=nn.Linear(4, 3)),
        CE, numbers(4), classes(),
    ),
    "a masked softmax with its own backward": Situation(
        "huggingface/transformers#22105", lambda: attends(masked_attention), CE,
        together(numbers(4, 4), lambda n: 1 - padding(n)), classes(), "first ggn", quick=True,
    ),
    "the last word that is no padding": Situation(
        "huggingface/transformers#35352", lambda: Net(last_word, words=nn.Embedding(5, 3), head=nn.Linear(3, 3)), CE,
        classes(4, of=5), classes(),
    ),
    "experts, all of them": Situation(
        "huggingface/transformers#31464",
        lambda: Net(experts, router=nn.Linear(4, 2), experts=nn.ModuleList([nn.Linear(4, 3) for _ in range(2)]),
        head=nn.Linear(3, 3)), lambda out, y: F.cross_entropy(out[0], y), numbers(4), classes(),
    ),
    "experts balanced over the batch, the gradient": Situation(
        "huggingface/transformers#28255",
        lambda: Net(experts, router=nn.Linear(4, 2), experts=nn.ModuleList([nn.Linear(4, 3) for _ in range(2)]),
        head=nn.Linear(3, 3)), balanced, numbers(4), classes(), "hessian",
    ),
    "experts balanced over the batch": Situation(
        "huggingface/transformers#28255",
        lambda: Net(experts, router=nn.Linear(4, 2), experts=nn.ModuleList([nn.Linear(4, 3) for _ in range(2)]),
        head=nn.Linear(3, 3)), balanced, numbers(4), classes(), "first",
        refused=Refused(MixedSamplesError, "weights.mean(0).square().sum()", ("BatchGrad",)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.quick])
def test_model(name: str) -> None:
    MODELS[name].check((3,), MODELS[name].trains)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model_of_any_size(name: str) -> None:
    row = MODELS[name]
    for training in row.modes:
        row.check((3, 1, 4) if row.refused is None else (3, 4), training)
