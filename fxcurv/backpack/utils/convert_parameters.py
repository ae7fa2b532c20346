"""A vector as a list of parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def vector_to_parameter_list(vec: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The entries of `vec` in the shapes of `parameters`: the inverse of `parameters_to_vector`.

    Args:
        vec: [D], D the number of entries of all parameters; more entries are left out.
        parameters: tensors of the wanted shapes.

    Returns:
        views of `vec`, without a graph.

    Raises:
        TypeError: if `vec` is no tensor.
    """
    if not isinstance(vec, Tensor):
        raise TypeError(f"a vector is a tensor, not a {type(vec).__name__}")
    shapes = [p.shape for p in parameters]
    numels = [s.numel() for s in shapes]
    pieces = vec.detach()[: sum(numels)].split(numels) if shapes else ()
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
