"""The images that the examples use: scikit-learn's digits, which need no download, or MNIST from idx files."""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate, pad

IDX_MAGIC = {2049: 1, 2051: 3}  # the first number of a file of unsigned bytes -> its number of axes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which images."""
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--root", type=Path, help="with --data mnist: the folder of train-*.gz or t10k-*.gz")


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] with mean 0 and variance 1 over all pixels, and labels [N] in 0..9."""
    images, labels = _digits() if args.data == "digits" else _mnist(args.root)
    return (images - images.mean()) / images.std(), labels


def batches(x: Tensor, y: Tensor, size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `size` samples without end, in a new order every epoch; an incomplete last one is left out."""
    if size > len(x):
        raise SystemExit(f"a batch of {size}, but there are {len(x)} images")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for batch in order.split(size)[: len(x) // size]:
            yield x[batch], y[batch]


def _digits() -> tuple[Tensor, Tensor]:
    """The 8x8 digits, enlarged to 20x20 in a frame of 4, which is where MNIST has its digits."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    enlarged = interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    return pad(enlarged, (4, 4, 4, 4)), torch.tensor(data.target)


def _mnist(root: Path | None) -> tuple[Tensor, Tensor]:
    """The training images of MNIST, or the test images where only those are there."""
    if root is None:
        raise SystemExit("--data mnist needs --root DIR, the folder of MNIST's idx files")
    for part in ("train", "t10k"):
        images, labels = root / f"{part}-images-idx3-ubyte.gz", root / f"{part}-labels-idx1-ubyte.gz"
        if images.exists() and labels.exists():
            return _idx(images).unsqueeze(1).float(), _idx(labels).long()
    raise SystemExit(f"neither train-*-ubyte.gz nor t10k-*-ubyte.gz, images and labels, are in {root}")


def _idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes: a magic number, the sizes as big-endian numbers, then the bytes."""
    with gzip.open(path) as file:
        content = file.read()
    axes = IDX_MAGIC.get(int.from_bytes(content[:4], "big"))
    if axes is None:
        raise SystemExit(f"{path} is no idx file of images or labels")
    start = 4 * (1 + axes)
    sizes = np.frombuffer(content[4:start], dtype=">u4").astype(int)
    values = np.frombuffer(content[start:], dtype=np.uint8).reshape(sizes)
    return torch.from_numpy(values.copy())
