"""What cases are made of: small models with their losses and batches, in float64.

A new case is a decorated function, or a line of a table:

    from cases import CASES
    for case in CASES.values():
        model, loss, inputs, targets = case.build()
        Oracle(model, loss, inputs, targets, **case.oracle)

Tags:
    hessian_slow        the oracle's Hessian takes more than half a second
    no_hessian          an op of the model has no second derivative in PyTorch
    nonconvex           no GGN quantity exists
    ambiguous_columns   SqrtGGN is to be compared by V VT: the definition gives a root but not its columns
    regularised         the loss has a term of the parameters alone
    several_leaves      f is several tensors
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Parts = tuple[nn.Module, Callable[..., Tensor], Any, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, loss and batch; `oracle`: keyword arguments of `Oracle`, `batch_dim`: that of `compile`."""

    name: str
    make: Callable[[], Parts]
    batch_dim: Any = 0
    tags: frozenset[str] = frozenset()
    oracle: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float64) -> Parts:
        """(model, loss, inputs, targets): equal at every call, drawn in float64 whatever `dtype` is."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # Said once per process, of the one case that is there because of it.
                warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
                torch.manual_seed(0)
                model, loss, inputs, targets = self.make()
        finally:
            torch.set_default_dtype(default)
        if dtype is not torch.float64:

            def cast(t: Tensor) -> Tensor:
                return t.to(dtype) if t.is_floating_point() else t

            model, loss = (
                model.to(dtype),
                copy.deepcopy(loss).to(dtype) if isinstance(loss, nn.Module) else loss,
            )
            inputs, targets = (tree_map_only(Tensor, cast, part) for part in (inputs, targets))
        return model, loss, inputs, targets


CASES: dict[str, Case] = {}


def add(name: str, make: Callable[[], Parts], tags: str = "", batch_dim: Any = 0, **oracle: Any) -> None:
    """Register a case; `tags` are words."""
    if name in CASES:
        raise ValueError(f"two cases are called {name}")
    CASES[name] = Case(name, make, batch_dim, frozenset(tags.split()), oracle)


def case(tags: str = "", batch_dim: Any = 0, **oracle: Any) -> Callable[[Callable[[], Parts]], Callable[[], Parts]]:
    """Register the decorated function under its name."""

    def register(make: Callable[[], Parts]) -> Callable[[], Parts]:
        add(make.__name__, make, tags, batch_dim, **oracle)
        return make

    return register


class Net(nn.Module):
    """Parts by name and a forward given as a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`run(self, *inputs)`."""
        return self.run(self, *args, **kwargs)


def param(*shape: int, scale: float = 0.5) -> nn.Parameter:
    """A random parameter."""
    return nn.Parameter(scale * torch.randn(shape))


def labels(*shape: int, classes: int = 3) -> Tensor:
    """Random class indices."""
    return torch.randint(classes, shape)


def classify(model: nn.Module, *shape: int, n: int = 4, classes: int = 3) -> Parts:
    """Mean cross-entropy on random inputs [n, *shape]."""
    return model, nn.CrossEntropyLoss(), torch.randn(n, *shape), labels(n, classes=classes)


def regress(model: nn.Module, *shape: int, n: int = 3) -> Parts:
    """Mean squared error on random inputs [n, *shape], with targets of the output's shape."""
    x = torch.randn(n, *shape)
    with torch.no_grad():
        return model, nn.MSELoss(), x, torch.randn_like(model(x))


def mlp(act: nn.Module | None = None, out: int = 3) -> nn.Sequential:
    """4 -> 5 -> out."""
    return nn.Sequential(nn.Linear(4, 5), act or nn.Tanh(), nn.Linear(5, out))


def flat_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits [N, T, C], tokens [N, T]."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def stack(*layers: nn.Module, shape: tuple[int, ...], out: int = 2) -> Parts:
    """The layers, tanh between them, then flattened into a linear layer."""
    body = nn.Sequential(*[layer for pair in zip(layers, [nn.Tanh() for _ in layers], strict=True) for layer in pair])
    with torch.no_grad():
        width = body(torch.randn(1, *shape)).numel()
    return classify(nn.Sequential(body, nn.Flatten(), nn.Linear(width, out)), *shape, n=3, classes=out)
