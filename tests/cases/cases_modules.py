"""Cases by module of `torch.nn` that the other files do not have, and networks on graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case_tools import Net, Parts, add, case, classify, labels, param, regress, stack
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

# ---- attention and recurrence ------------------------------


@case(kind="ce", tags="hessian_slow")
def transformer() -> Parts:
    """Encoder and decoder, with a causal mask and padding."""
    model = Net(
        lambda m, source, x, padding: m.head(
            m.body(
                source,
                x,
                tgt_mask=nn.Transformer.generate_square_subsequent_mask(2, dtype=x.dtype),
                tgt_is_causal=True,
                src_key_padding_mask=padding,
                memory_key_padding_mask=padding,
            )[:, -1]
        ),
        body=nn.Transformer(2, 1, 1, 1, 3, dropout=0.0, batch_first=True),
        head=nn.Linear(2, 2),
    ).eval()
    padding = torch.tensor([[0, 0, 0], [0, 0, float("-inf")], [0, 0, 0]])
    return model, nn.CrossEntropyLoss(), (torch.randn(3, 3, 2), torch.randn(3, 2, 2), padding), labels(3, classes=2)


@case(kind="mse")
def multihead_attention_masks() -> Parts:
    """A mask per head and pair of positions, attention to zeros, the weights of every head."""

    def run(m: Any, x: Tensor) -> Tensor:
        mask = torch.tensor([[0.0, -1.0, float("-inf")], [0.5, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=x.dtype)
        out, weights = m.attention(x, x, x, attn_mask=mask, average_attn_weights=False)
        return out + weights.square().sum((1, 3))[..., None]

    return regress(Net(run, attention=nn.MultiheadAttention(4, 2, batch_first=True, add_zero_attn=True)).eval(), 3, 4)


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm_two_layers_bidirectional_projected": lambda: nn.LSTM(
        2, 2, 2, batch_first=True, bidirectional=True, proj_size=1
    ),
    "rnn_relu_two_layers_bidirectional": lambda: nn.RNN(2, 2, 2, "relu", batch_first=True, bidirectional=True),
}
for _name, _recurrent in RECURRENT.items():

    def _make_recurrent(recurrent: Callable[[], nn.Module] = _recurrent) -> Parts:
        model = Net(lambda m, x: m.head(m.cell(x)[0].mean(1)), cell=recurrent(), head=nn.LazyLinear(2))
        model(torch.randn(1, 3, 2))
        return classify(model, 3, 2, n=3, classes=2)

    add(_name, _make_recurrent, "hessian_slow", kind="ce")


@case(kind="mse")
def lstm_with_initial_state() -> Parts:
    """The state of every sample is an input, the last states are read."""

    def run(m: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        out, (h, c) = m.cell(x, (h.transpose(0, 1), c.transpose(0, 1)))
        return out.sum(1) + h[-1] * c[-1]

    model = Net(run, cell=nn.LSTM(2, 2, batch_first=True))
    return model, nn.MSELoss(), (torch.randn(3, 3, 2), torch.randn(3, 1, 2), torch.randn(3, 1, 2)), torch.randn(3, 2)


# ---- lookups and products ------------------------------


def bags(mode: str) -> Callable[[], Parts]:
    """Bags of tokens, a weight for each where they are summed."""

    def make() -> Parts:
        model = Net(
            lambda m, t, w: m.head(torch.tanh(m.bag(t, per_sample_weights=w if mode == "sum" else None))),
            bag=nn.EmbeddingBag(5, 3, mode=mode),
            head=nn.Linear(3, 3),
        )
        return model, nn.CrossEntropyLoss(), (labels(3, 4, classes=5), torch.rand(3, 4)), labels(3)

    return make


for _mode in ("sum", "mean", "max"):
    add(f"embedding_bag_{_mode}", bags(_mode), kind="ce")


@case(kind="ce")
def bilinear() -> Parts:
    model = Net(
        lambda m, x, z: m.head(torch.tanh(m.pair(x, torch.tanh(m.first(z))))),
        first=nn.Linear(3, 2),
        pair=nn.Bilinear(4, 2, 3),
        head=nn.Linear(3, 3),
    )
    return model, nn.CrossEntropyLoss(), (torch.randn(3, 4), torch.randn(3, 3)), labels(3)


# ---- rearranged images ------------------------------


add("pixel_shuffle", lambda: stack(nn.Conv2d(1, 4, 2), nn.PixelShuffle(2), shape=(1, 3, 3)), kind="ce")
add("pixel_unshuffle", lambda: stack(nn.Conv2d(1, 2, 2), nn.PixelUnshuffle(2), shape=(1, 5, 3)), kind="ce")
add("unfold_fold", lambda: stack(nn.Conv2d(1, 2, 2), Patches(), shape=(1, 4, 4)), kind="ce")
add("channel_shuffle", lambda: stack(nn.Conv2d(1, 4, 2), nn.ChannelShuffle(2), shape=(1, 3, 3)), kind="ce")
RESIZES: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"scale_factor": 2, "align_corners": True}, 1),
    "bicubic": ({"size": (3, 4)}, 2),
    "trilinear": ({"scale_factor": (1, 2, 1)}, 3),
    "nearest-exact": ({"size": (3, 2)}, 2),
    "area": ({"size": (2, 3)}, 2),
}
for _mode, (_options, _dim) in RESIZES.items():

    def _make_resized(mode: str = _mode, options: dict[str, Any] = _options, dim: int = _dim) -> Parts:
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dim](1, 2, 2)
        resize = Net(lambda m, x: F.interpolate(x, mode=mode, **options))
        return stack(conv, resize, shape=(1, *[3] * dim))

    add(f"interpolate_{_mode.replace('-', '_')}", _make_resized, kind="ce")


class Patches(nn.Module):
    """Overlapping patches, mixed and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.unfold, self.mix, self.fold = nn.Unfold(2), nn.Linear(8, 8), nn.Fold((3, 3), 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2, 3, 3] -> [N, 2, 3, 3]."""
        return self.fold(torch.tanh(self.mix(self.unfold(x).mT)).mT)


# ---- derived weights ------------------------------


@case(kind="ce")
def orthogonal_weight() -> Parts:
    return classify(nn.Sequential(orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 3)), 3)


class Adapted(nn.Module):
    """A frozen layer and a trainable update of low rank."""

    def __init__(self, layer: nn.Linear, rank: int = 1) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = param(rank, layer.in_features), param(layer.out_features, rank)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b + x down^T up^T."""
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up)


@case(kind="ce")
def adapters_in_a_transformer() -> Parts:
    """All of an encoder layer frozen, adapters on its feed-forward layers."""
    # tanh, since with ReLU and all of the layer frozen PyTorch takes a fused kernel, past the adapters
    layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True, activation=torch.tanh)
    layer.requires_grad_(False)
    layer.linear1, layer.linear2 = Adapted(layer.linear1), Adapted(layer.linear2)
    model = Net(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(4, 2))
    return classify(model, 3, 4, n=3, classes=2)


# ---- graphs ------------------------------


@case(kind="ce")
def graph_convolution() -> Parts:
    """A batch of graphs with their adjacency matrices [N, nodes, nodes], pooled."""

    def run(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        a = adjacency + torch.eye(adjacency.shape[-1], dtype=x.dtype)
        root = a.sum(-1).rsqrt()
        a = root[:, :, None] * a * root[:, None, :]
        h = F.relu(a @ m.first(x))
        return m.head(F.relu(a @ m.second(h)).mean(1))

    edges = (torch.rand(3, 4, 4) > 0.5).double().triu(1)
    model = Net(run, first=nn.Linear(2, 3), second=nn.Linear(3, 3), head=nn.Linear(3, 2))
    return model, nn.CrossEntropyLoss(), (torch.randn(3, 4, 2), edges + edges.mT), labels(3, classes=2)


@case(kind="ce")
def graph_attention() -> Parts:
    """Scores of all pairs of nodes, those without an edge left out."""

    def run(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        h = m.mix(x)
        scores = F.leaky_relu(m.source(h) + m.target(h).mT, 0.2)
        weights = scores.masked_fill(adjacency == 0, float("-inf")).softmax(-1)
        return m.head(F.elu(weights @ h).amax(1))

    edges = ((torch.rand(3, 4, 4) > 0.5) | torch.eye(4, dtype=torch.bool)).double()
    model = Net(run, mix=nn.Linear(2, 3), source=nn.Linear(3, 1), target=nn.Linear(3, 1), head=nn.Linear(3, 2))
    return model, nn.CrossEntropyLoss(), (torch.randn(3, 4, 2), edges), labels(3, classes=2)


@case(kind="ce")
def message_passing() -> Parts:
    """Lists of edges [N, 2, E]: messages gathered at their sources, added up at their targets."""

    def run(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        source, target = (e[..., None].expand(-1, -1, x.shape[-1]) for e in edges.unbind(1))
        message = torch.tanh(m.message(torch.cat([x.gather(1, source), x.gather(1, target)], -1)))
        h = torch.zeros_like(x).scatter_add(1, target, message)
        return m.head(m.update(h, x).mean(1))

    def update(m: Any, h: Tensor, x: Tensor) -> Tensor:
        return m.cell(h.flatten(0, 1), x.flatten(0, 1)).view(x.shape)

    model = Net(run, message=nn.Linear(4, 2), update=Net(update, cell=nn.GRUCell(2, 2)), head=nn.Linear(2, 2))
    return model, nn.CrossEntropyLoss(), (torch.randn(3, 4, 2), labels(3, 2, 5, classes=4)), labels(3, classes=2)
