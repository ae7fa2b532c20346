"""Peers that put hooks on a model's layers: Opacus for norms and clipping, ASDL for Kronecker factors.

Builders as in ``peers.py``. Both packages hook layers alone, so that parameters of other modules are frozen.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import Problem, Quantity
from peers import MATRICES, Fields, Implementation, _given, _named, _set_up
from torch import Tensor, nn
from torch.nn import functional as F


def _frozen_but(model: nn.Module, params: dict[str, nn.Parameter], classes: tuple[type[nn.Module], ...]) -> str:
    """Freeze what hooks do not reach; returns the row's note."""
    for name, param in model.named_parameters():
        param.requires_grad_(name in params)
    return f"only the parameters of {', '.join(c.__name__ for c in classes)}" if classes else ""


def _opacus(problem: Problem, **options: Any) -> tuple[Any, dict[str, nn.Parameter], Callable[[], Tensor], list, str]:
    """(hooked model, its parameters, what makes the losses [N] of the samples, what stands before a call, the note)."""
    package = importlib.import_module("opacus.grad_sample")
    model, _, x, y = _set_up(problem)
    params = _named(model, problem.only)
    note = _frozen_but(model, params, problem.only)
    # "sum", of losses that carry the mean's 1/N: then individual gradients are those of the mean loss
    hooked = package.GradSampleModuleFastGradientClipping(model, loss_reduction="sum", **options)

    def losses() -> Tensor:
        each = F.cross_entropy(hooked(x), y, reduction="none") / y.numel()
        return each if each.ndim == 1 else each.flatten(1).sum(1)

    return hooked, params, losses, _given(model, x, y), note


def _reset(hooked: nn.Module, params: dict[str, nn.Parameter]) -> None:
    hooked.zero_grad()
    for param in params.values():
        param._norm_sample = None


def ghost_norms(problem: Problem, quantity: Quantity) -> Implementation | None:
    """Opacus' norms of individual gradients (Gram matrices for linear layers and embeddings), in one backward pass."""
    if quantity.func != "l2":
        return None
    hooked, params, losses, given, note = _opacus(problem)

    def call() -> None:
        losses().sum().backward()

    def fields(_: Any) -> Fields:
        return {"batch_l2": {name: param._norm_sample.square() for name, param in params.items()}}

    return Implementation(call, given, partial(_reset, hooked, params), fields, note)


def clipping(problem: Problem, quantity: Quantity, ghost: bool = True) -> Implementation | None:
    """Opacus' clipped gradient by two backward passes; ``ghost``: norms by Gram matrices where it has them."""
    if quantity.func != "clipped":
        return None
    ((_, arguments),) = quantity.extensions
    options = {"max_grad_norm": arguments["max_norm"], "use_ghost_clipping": ghost}
    hooked, params, losses, given, note = _opacus(problem, **options)
    both = importlib.import_module("opacus.utils.fast_gradient_clipping_utils").DPTensorFastGradientClipping
    optimizer = torch.optim.SGD(params.values())  # drops the first pass's gradient

    def call() -> None:
        both(hooked, optimizer, losses(), "sum").backward()

    def fields(_: Any) -> Fields:
        clipped = {name: param.grad for name, param in params.items()}
        return {} if problem.only else {"grad_clipped": clipped}  # the norm of some parameters clips otherwise

    note = "; ".join(filter(None, (note, "two backward passes, without the plain gradient")))
    return Implementation(call, given, partial(_reset, hooked, params), fields, note)


def asdl(problem: Problem, quantity: Quantity, sampled: bool = False) -> Implementation | None:
    """ASDL's Kronecker factors: one backward pass for each class, or of a sampled label; and the gradient."""
    if quantity.curvlinops.get("fisher_type") != ("mc" if sampled else "type-2"):
        return None
    package = importlib.import_module("asdl")
    model, _, x, y = _set_up(problem)
    classes = MATRICES if problem.only else ()
    note = _frozen_but(model, _named(model, classes), classes)
    config = package.FisherConfig(
        fisher_type="fisher_mc" if sampled else "fisher_exact", fisher_shapes=["kron"], loss_type="cross_entropy",
        data_size=y.numel(), ignore_modules=[m for m in model.modules() if classes and not isinstance(m, classes)],
    )  # fmt: skip
    maker = package.get_fisher_maker(model, config)
    output = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, output, y)
    if y.ndim > 1:
        maker.setup_logits_repr(output.transpose(1, -1))  # classes last
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def call() -> None:
        maker.forward_and_backward(calc_loss_grad=True)

    def reset() -> None:
        model.zero_grad()
        maker.zero_fisher()

    def fields(_: Any) -> Fields:
        found: dict[str, list[Tensor]] = {}
        for name, module in linear.items() if y.ndim == 1 else ():
            kron = module.fisher.kron
            found |= {f"{name}.weight": [kron.B, kron.A], f"{name}.bias": [kron.B]}
        return {"kflr": found}

    other = "other factors on convolutions" if any(isinstance(m, nn.Conv2d) for m in model.modules()) else ""
    note = "; ".join(filter(None, (note, other)))
    return Implementation(call, _given(model, x, y), reset, fields, note)


BUILDERS: dict[str, Callable[[Problem, Quantity], Implementation | None]] = {
    "opacus:ghost_norms": ghost_norms,
    "opacus:ghost_clipping": clipping,
    "opacus:fast_clipping": partial(clipping, ghost=False),
    "asdl:kron_exact": asdl,
    "asdl:kron_mc": partial(asdl, sampled=True),
}
