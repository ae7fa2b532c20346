"""Kronecker factors straight from their definition, for models made of modules, by plain autograd.

Per call of a layer, with y its output: the inputs a[n, s] at a position are what y[n, o, s] = sum_i W[o, i] a[n, s, i]
says, the derivative of one output entry by the weight's row; the columns b[v, n, s] are ds_v/dy. Samples are in
dimension 0 everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from oracle import Oracle, derivative, plain_mathematics
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def input_first(layer: nn.Module) -> bool:
    """Whether the weight is [in, out]: an embedding's, and that of the linear layer of transformers' GPT-2."""
    return isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"


def is_layer(module: nn.Module) -> bool:
    """Whether factors of its weight are defined here."""
    return isinstance(module, LAYERS) or input_first(module)


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight [*lead, *P] as [*lead, out, in]."""
    if input_first(layer):
        return weight.mT
    if isinstance(layer, TRANSPOSED):
        inputs, outputs, *kernel = layer.weight.shape
        k, lead = layer.groups, weight.shape[: weight.ndim - layer.weight.ndim]
        split = weight.reshape(*lead, k, inputs // k, outputs, -1).transpose(-3, -2)
        return split.reshape(*lead, k * outputs, -1)
    return weight.flatten(weight.ndim - layer.weight.ndim + 1)


def in_parameter_order(layer: nn.Module, block: Tensor) -> Tensor:
    """A block over `matrix` flattened, over the weight flattened."""
    w = layer.weight
    index = matrix(layer, torch.arange(w.numel()).reshape(w.shape)).flatten()
    back = index.argsort()
    return block[back][:, back]


def channels_last(layer: nn.Module, y: Tensor) -> Tensor:
    """The output of one sample with features last, [S, O]."""
    images = (*CONVOLUTIONS, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    first = isinstance(layer, images) or getattr(layer, "data_format", "") == "channels_first"
    y = y.movedim(0, -1) if first else y
    return y.reshape(-1, y.shape[-1])


def inputs_of(layer: nn.Module, x: Tensor) -> Tensor:
    """a, [N, S, I], averaged over groups: from y = W a."""
    groups = getattr(layer, "groups", 1)
    rows = []
    for sample in x:
        with torch.enable_grad():
            y = channels_last(layer, layer(sample[None])[0])
        per_group = y.shape[1] // groups
        for position in y:
            firsts = [k * per_group for k in range(groups)]
            a = [matrix(layer, derivative(position[o], [layer.weight])[0])[o] for o in firsts]
            rows.append(torch.stack(a).mean(0))
    return torch.stack(rows).reshape(len(x), -1, rows[0].numel())


class KroneckerOracle(Oracle):
    """An oracle that also knows what entered and left every layer and norm."""

    @functools.cached_property
    def calls(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Layer path -> (input, output) of each call, the outputs with the graph to `f`."""
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        handles = []
        for path, layer in self.model.named_modules():
            if is_layer(layer) or isinstance(layer, NORMS):
                handles.append(layer.register_forward_hook(functools.partial(note, found.setdefault(path, []))))
        self.__dict__.pop("end", None)
        with plain_mathematics(), torch.enable_grad():
            self.end  # noqa: B018
        for handle in handles:
            handle.remove()
        return found

    def columns_at(self, path: str, columns: Tensor) -> list[Tensor]:
        """b [V, N, S, O] at each call of a layer, from columns [V, N, C] at f."""
        layer, outputs = self.model.get_submodule(path), [y for _, y in self.calls[path]]
        parts: list[list[Tensor]] = [[] for _ in outputs]
        for column in columns:
            for part, g in zip(parts, derivative((self.f * column).sum(), outputs), strict=True):
                part.append(torch.stack([channels_last(layer, g_n) for g_n in g]))
        found = [torch.stack(part) for part in parts]
        if getattr(layer, "padding_idx", None) is not None:  # what is looked up there gets no gradient
            counted = [(x != layer.padding_idx).flatten(1)[..., None] for x, _ in self.calls[path]]
            found = [b * c for b, c in zip(found, counted, strict=True)]
        return found

    def factors(self, path: str, columns: Tensor, sharing: str, fold: Callable[[Tensor], Tensor] | None = None):
        """(B, A) of a layer's weight."""
        layer, calls = self.model.get_submodule(path), self.calls[path]
        if sharing == "backpack":
            once = isinstance(layer, CONVOLUTIONS) and layer.groups == 1 and len(calls) == 1
            sharing = "convolution" if once else "expand"
        a = torch.cat([inputs_of(layer, x) for x, _ in calls], 1)
        b = torch.cat(self.columns_at(path, columns), 2)
        n, s = a.shape[:2]
        if sharing == "convolution":
            return outer(b.sum(2)), outer(a) / n
        if sharing == "expand":
            return outer(b), outer(a) / (n * s)
        return outer(b.sum(2) if fold is None else fold(b.sum(2))), outer(a.mean(1)) / n

    def empirical(self) -> Tensor:
        """The sampled column with the target for the sample, [1, N, C]: dL/df over the root of c omega / Z."""
        diagonal = self.h.diagonal(dim1=1, dim2=2)
        if self.kind == "mse":
            return (self.s / (diagonal / 2).sqrt())[None]
        if self.kind == "bce":
            p = self.f.detach().sigmoid()
            return (self.s / (diagonal / (p * (1 - p))).sqrt())[None]
        p, scale, index = self.ce_scale
        shaped = self.s[:, index].reshape(p.shape)
        divided = torch.where(scale[..., None] > 1e-14, shaped / scale[..., None].sqrt(), 0.0)
        return divided.flatten(1)[:, index.argsort()][None]


def note(calls: list, layer: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
    """A forward hook; what goes on is a copy, which in-place ops may change."""
    calls.append((args[0].detach(), y))
    return y.clone()


def outer(rows: Tensor) -> Tensor:
    """The sum of r r^T over all leading axes."""
    flat = rows.flatten(0, -2)
    return flat.T @ flat
