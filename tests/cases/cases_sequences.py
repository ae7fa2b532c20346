"""Cases of attention and recurrence."""

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
    param,
    regress,
)
from torch import Tensor, nn

# ---- attention and recurrence ------------------------------


def encoder(tags: str, name: str, **options: Any) -> None:
    """A transformer encoder layer, pooled and classified."""

    def make() -> Parts:
        layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True, **options)
        return classify(
            Net(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(4, 2)).eval(),
            3,
            4,
            n=3,
            classes=2,
        )

    add(name, make, tags, kind="ce")


encoder("", "transformer_encoder")
encoder("", "transformer_encoder_norm_first", norm_first=True, activation="gelu", bias=False)


@case(kind="ce", class_dim=-1, tags="ambiguous_columns")
def transformer_decoder_lm() -> Parts:
    """A causal language model: joint projection, SDPA, RMS norms, gated MLP, tied head."""

    def run(m: Any, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        x = m.emb(tokens) + m.pos.weight[:t]
        q, k, v = (part.view(n, t, 2, 2).transpose(1, 2) for part in m.qkv(m.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + m.out(mixed.transpose(1, 2).reshape(n, t, 4))
        h = m.norm2(x)
        x = x + m.down(F.silu(m.gate(h)) * m.up(h))
        return F.linear(x, m.emb.weight)

    def linear(*size: int) -> nn.Linear:
        return nn.Linear(*size, bias=False)

    model = Net(
        run,
        emb=nn.Embedding(5, 4),
        pos=nn.Embedding(4, 4),
        norm1=nn.RMSNorm(4),
        qkv=linear(4, 12),
        out=linear(4, 4),
        norm2=nn.LayerNorm(4),
        gate=linear(4, 3),
        up=linear(4, 3),
        down=linear(3, 4),
    )
    return model, flat_cross_entropy, labels(2, 3, classes=5), labels(2, 3, classes=5)


@case(kind="mse")
def sdpa_masks() -> Parts:
    """Attention with a boolean mask, an additive mask, a scale, and grouped queries."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(len(x), 3, -1, 2).transpose(1, 2) for w in (m.q, m.k, m.v))
        keep = torch.ones(3, 3, dtype=torch.bool).tril()
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
        b = F.scaled_dot_product_attention(q[:, :1], k, v, attn_mask=m.bias, scale=0.3)
        return torch.cat([a, b], 1).sum((1, 2))

    return regress(Net(run, q=nn.Linear(3, 4), k=nn.Linear(3, 2), v=nn.Linear(3, 2), bias=param(3, 3)), 3, 3)


@case(kind="mse")
def multihead_attention_inputs() -> Parts:
    """Query, key and value apart, sequence first, a padding mask per sample."""
    attention = nn.MultiheadAttention(4, 2, dropout=0.0, batch_first=True)
    model = Net(
        lambda m, q, k, v, mask: m.attention(q, k, v, key_padding_mask=mask, need_weights=False)[0],
        attention=attention,
    ).eval()
    mask = torch.tensor([[False, False, True], [False, True, False]])
    return model, nn.MSELoss(), (*(torch.randn(2, t, 4) for t in (2, 3, 3)), mask), torch.randn(2, 2, 4)


@case(kind="mse", batch_dim=1, out_dim=1)
def multihead_attention_weights() -> Parts:
    """Sequence first, other sizes of key and value, bias_kv, the averaged weights used as well."""

    def run(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        out, weights = m.attention(x, memory, memory, need_weights=True)
        return out + m.scale * weights.square().sum(-1).t()[..., None]

    model = Net(run, attention=nn.MultiheadAttention(2, 1, kdim=3, vdim=3, add_bias_kv=True), scale=param(1)).eval()
    return model, nn.MSELoss(), (torch.randn(2, 3, 2), torch.randn(3, 3, 3)), torch.randn(2, 3, 2)


@case(kind="ce")
def transformer_decoder_layer() -> Parts:
    """Self- and cross-attention."""
    layer = nn.TransformerDecoderLayer(3, 1, 2, dropout=0.0, batch_first=True, norm_first=True)
    model = Net(
        lambda m, x, memory: m.head(
            m.layer(
                x,
                memory,
                tgt_is_causal=True,
                tgt_mask=nn.Transformer.generate_square_subsequent_mask(2, dtype=x.dtype),
            )[:, -1]
        ),
        layer=layer,
        head=nn.Linear(3, 3),
    ).eval()
    return model, nn.CrossEntropyLoss(), (torch.randn(3, 2, 3), torch.randn(3, 3, 3)), labels(3)


@case(kind="ce")
def vision_transformer() -> Parts:
    """Patches by a strided convolution, a class token, positions, one layer."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.pos
        return m.head(m.layer(x)[:, 0])

    layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True, norm_first=True)
    return classify(
        Net(
            run,
            patch=nn.Conv2d(1, 4, 2, stride=2),
            token=param(1, 1, 4),
            pos=param(1, 5, 4),
            layer=layer,
            head=nn.Linear(4, 3),
        ).eval(),
        1,
        4,
        4,
        n=3,
    )


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(2, 3, batch_first=True),
    "gru": lambda: nn.GRU(2, 3, batch_first=True),
    "rnn_tanh": lambda: nn.RNN(2, 3, batch_first=True),
    "lstm_projected_nobias": lambda: nn.LSTM(2, 3, batch_first=True, proj_size=2, bias=False),
    "gru_two_layers_bidirectional": lambda: nn.GRU(2, 2, 2, batch_first=True, bidirectional=True),
}
for _name, _recurrent in RECURRENT.items():

    def _make_recurrent(recurrent: Callable[[], nn.Module] = _recurrent) -> Parts:
        model = Net(lambda m, x: m.head(m.cell(x)[0].mean(1)), cell=recurrent(), head=nn.LazyLinear(2))
        model(torch.randn(1, 3, 2))
        return classify(model, 3, 2, n=3, classes=2)

    add(_name, _make_recurrent, "hessian_slow" if "two" in _name else "", kind="ce")


@case(kind="ce", batch_dim=1)
def lstm_sequence_first() -> Parts:
    """Samples second in the input and first in the output, which is the last hidden state."""
    model = Net(lambda m, x: m.head(m.cell(x)[1][0][-1]), cell=nn.LSTM(2, 2), head=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(3, 3, 2), labels(3)


# ---- the batch anywhere ------------------------------


@case(kind="ce", batch_dim=1, class_dim=-1, out_dim=1, tags="ambiguous_columns")
def lstm_sequence_first_labels() -> Parts:
    """Samples second in inputs, outputs and targets: a label per step."""
    model = Net(lambda m, x: m.head(m.cell(x)[0]), cell=nn.LSTM(2, 2), head=nn.Linear(2, 3))
    return model, flat_cross_entropy, torch.randn(3, 2, 2), labels(3, 2)


@case(kind="mse", batch_dim=(1, 1, 1, 0), out_dim=1, tags="hessian_slow")
def transformer_sequence_first() -> Parts:
    """Source and target sequences with samples second, padding masks with samples first; nothing pooled."""
    inner = nn.Transformer(4, 2, 1, 1, 2, dropout=0.0)
    causal = nn.Transformer.generate_square_subsequent_mask(2, dtype=torch.float64)

    def run(m: Any, source: Tensor, target: Tensor, shift: Tensor, padding: Tensor) -> Tensor:
        masks = {"tgt_mask": m.causal, "tgt_is_causal": True, "src_key_padding_mask": padding}
        return m.inner(source + shift, target, **masks)

    padding = torch.tensor([[False, False, True], [False, True, False], [False, False, False]])
    model = Net(run, inner=inner, causal=causal).eval()
    inputs = (torch.randn(3, 3, 4), torch.randn(2, 3, 4), torch.randn(1, 3, 4), padding)
    return model, nn.MSELoss(), inputs, torch.randn(2, 3, 4)


@case(kind="mse", batch_dim=1, out_dim=1)
def multihead_attention_sequence_first() -> Parts:
    """Joint projections of [T, N, D], which attention merges to [T, N H, D / H]."""
    model = Net(lambda m, x: m.attention(x, x, x, need_weights=False)[0], attention=nn.MultiheadAttention(4, 2)).eval()
    return model, nn.MSELoss(), torch.randn(3, 2, 4), torch.randn(3, 2, 4)


@case(kind="mse", batch_dim={"nodes": 0, "adjacency": None, "where": None})
def graph_network() -> Parts:
    """An adjacency matrix and positions that all samples share: inputs without samples."""

    def run(m: Any, nodes: Tensor, adjacency: Tensor, where: Tensor) -> Tensor:
        h = torch.tanh(m.first(adjacency @ (nodes + m.table(where))))
        return m.second(adjacency @ h)

    model = Net(run, first=nn.Linear(2, 3), second=nn.Linear(3, 2), table=nn.Embedding(5, 2))
    inputs = {
        "nodes": torch.randn(2, 4, 2),
        "adjacency": torch.rand(4, 4).softmax(1),
        "where": torch.tensor([0, 3, 1, 0]),
    }
    return model, nn.MSELoss(), inputs, torch.randn(2, 4, 2)


def _merged(sequence_first: bool) -> Callable[[], Parts]:
    def make() -> Parts:
        def run(m: Any, x: Tensor) -> Tensor:
            steps, n, d = x.shape
            h = torch.tanh(m.lin(x.reshape(steps * n, d)))
            mixed = torch.cumsum(h.view(steps, n, -1), 0 if sequence_first else 1)
            return m.head(mixed.reshape(steps * n, -1))

        model = Net(run, lin=nn.Linear(2, 3), head=nn.Linear(3, 3))
        return model, nn.CrossEntropyLoss(), torch.randn(3, 2, 2), labels(6)

    return make


def _unmerged(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).view(3, 2, 3)


def _merge(f: Tensor) -> Tensor:
    return f.flatten(0, 1)


# the model's own output, and its targets, are [T N, C] or [N T, C]
add(
    "merged_sequence_first", _merged(True), "ambiguous_columns", batch_dim=1, kind="ce", class_dim=-1, out_dim=1,
    logits=_unmerged, head=_merge,
)  # fmt: skip
add("merged_batch_first", _merged(False), "ambiguous_columns", kind="ce", class_dim=-1, logits=_unmerged, head=_merge)


@case(kind="ce", batch_dim=(1, 0), class_dim=-1, out_dim=1, tags="ambiguous_columns")
def ragged_sequence_first() -> Parts:
    """Sequences of different lengths: a padding mask in the attention, labels that the mean ignores; one has none left."""

    def run(m: Any, tokens: Tensor, padding: Tensor) -> Tensor:
        x = m.emb(tokens)
        x = x + m.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return m.head(x)

    padding = torch.tensor([[False, False, False], [False, False, True], [False, True, True]])
    y = labels(3, 3).masked_fill(padding.t(), -100)
    y[0, 2] = -100
    model = Net(run, emb=nn.Embedding(4, 2), attention=nn.MultiheadAttention(2, 1), head=nn.Linear(2, 3)).eval()
    return model, flat_cross_entropy, (labels(3, 3, classes=4), padding), y


@case(kind="mse")
def gru_cell_loop() -> Parts:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 2)
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
        return h

    return regress(Net(run, cell=nn.GRUCell(2, 2)), 3, 2)
