"""What BackPACK's example scripts share: batches of MNIST, and columns of the Gauss-Newton by autograd."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, Dataset

from fxcurv.backpack.hessianfree.ggnvp import ggn_vector_product
from fxcurv.backpack.utils.convert_parameters import vector_to_parameter_list


def load_mnist_dataset() -> Dataset:
    """MNIST's training images in ./data, normalised: torchvision downloads them.

    Raises:
        ImportError: without torchvision.
    """
    from torchvision import datasets, transforms  # type: ignore[import-not-found]

    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    return datasets.MNIST(root="./data", train=True, transform=transforms.Compose(steps), download=True)


def get_mnist_dataloader(batch_size: int = 64, shuffle: bool = True) -> DataLoader:
    """Batches of `load_mnist_dataset()`."""
    return DataLoader(load_mnist_dataset(), batch_size=batch_size, shuffle=shuffle)


def load_one_batch_mnist(batch_size: int = 64, shuffle: bool = True, flat: bool = False) -> tuple[Tensor, Tensor]:
    """(images [N, 1, 28, 28], or [N, 784] if `flat`; labels [N]) of one batch."""
    images, labels = next(iter(get_mnist_dataloader(batch_size, shuffle)))
    return images.flatten(1) if flat else images, labels


def autograd_diag_ggn_exact(
    X: Tensor,  # noqa: N803
    y: Tensor,
    model: nn.Module,
    loss_function: nn.Module,
    idx: Iterable[Any] | None = None,
) -> Tensor:
    """The Gauss-Newton's diagonal by autograd alone, a product for each entry.

    Args:
        X, y: a batch.
        model, loss_function: of the model, the trainable parameters count, one after another.
        idx: which entries; all of them for None.

    Returns:
        [D], or one entry for each of `idx`.
    """
    return torch.stack([column[k] for k, column in _autograd_ggn_exact_columns(X, y, model, loss_function, idx)])


def _autograd_ggn_exact_columns(
    X: Tensor,  # noqa: N803
    y: Tensor,
    model: nn.Module,
    loss_function: nn.Module,
    idx: Iterable[Any] | None = None,
) -> Iterator[tuple[Any, Tensor]]:
    """(k, column k [D] of the Gauss-Newton) for each k of `idx`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in trained)
    output = model(X)
    loss = loss_function(output, y)
    for k in range(size) if idx is None else idx:
        unit = torch.zeros(size, device=loss.device, dtype=loss.dtype)
        unit[k] = 1
        column = ggn_vector_product(loss, output, model, vector_to_parameter_list(unit, trained))
        yield k, parameters_to_vector([t.contiguous() for t in column])
