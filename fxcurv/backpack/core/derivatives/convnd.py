"""The switch between BackPACK's algorithms for convolutions, which the compiler does without: it picks one by cost."""

from __future__ import annotations


class weight_jac_t_save_memory:  # noqa: N801
    """A context without effect: for every convolution the cheapest algorithm is chosen, and `explain()` says which.

    Args:
        save_memory: accepted, without effect.
    """

    def __init__(self, save_memory: bool = True):
        self.save_memory = save_memory

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None
