"""How each implementation makes a quantity: fxcurv, BackPACK, torch.func, curvlinops, and the plain gradient.

``hook_peers.py`` has Opacus and ASDL.

A builder takes a problem and a quantity and returns an ``Implementation``, or None where the implementation
does not offer the quantity.  Each gets a model of its own with the same parameters, since hooks stay on a
model.  Whatever a builder or a call raises becomes the reason in an empty cell.

A call leaves its results alive: it returns them, or (BackPACK, plain) they lie on the parameters.  ``reset``
brings the model back to where it was, and is not timed.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import CLIP, Problem, Quantity
from torch import Tensor, nn

Fields = dict[str, dict[str, Any]]

# Kronecker factors are of these modules' parameters where a model has others too.
KRONECKER, MATRICES = ("KFAC", "KFLR", "KFRA"), (nn.Linear, nn.Conv2d)


@dataclass
class Implementation:
    """One way to compute a quantity.

    Attributes:
        call: Computes it; what it returns holds the results that do not lie on the parameters.
        given: The tensors that stand before a call: parameters, buffers, the batch.
        reset: Drops what a call left on the model.
        fields: From what ``call`` returned to field -> parameter name -> value, for comparing values.
        note: What a reader of the row has to know.
    """

    call: Callable[[], Any]
    given: list[Tensor]
    reset: Callable[[], None] = lambda: None
    fields: Callable[[Any], Fields] = lambda raw: {}
    note: str = ""


def _set_up(problem: Problem) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, y = problem.build()
    return model, nn.CrossEntropyLoss(), x, y


def _named(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> dict[str, nn.Parameter]:
    """The trainable parameters that hook-based peers reach: those of these module classes, all for no class."""
    if not classes:
        return {name: param for name, param in model.named_parameters() if param.requires_grad}
    return {
        f"{path}.{name}": param
        for path, module in model.named_modules()
        if isinstance(module, classes)
        for name, param in module.named_parameters(recurse=False)
        if param.requires_grad
    }


def _given(model: nn.Module, *others: Tensor) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *others]


def _products(functions: dict[str, Any], vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: functions[name](vector) for name, vector in vectors.items()}


def _vectors(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """One vector per parameter, [V=1, *P]."""
    torch.manual_seed(1)
    return {name: torch.randn(1, *param.shape, device=param.device) for name, param in params.items()}


def plain(problem: Problem, quantity: Quantity | None = None, backend: str = "eager") -> Implementation:
    """Forward and backward, nothing else: the unit of all ratios."""
    model, loss, x, y = _set_up(problem)
    run = model if backend == "eager" else torch.compile(model, backend=backend, dynamic=False)

    def call() -> None:
        loss(run(x), y).backward()

    return Implementation(call, _given(model, x, y), model.zero_grad)


def fxcurv(problem: Problem, quantity: Quantity, **options: Any) -> Implementation | None:
    """The compiled program, called as a user calls it; `options` go to `fxcurv.compile`."""
    package = importlib.import_module("fxcurv")
    offered = importlib.import_module("fxcurv.extensions")
    if any(getattr(offered, name, None) is None for name, _ in quantity.extensions):
        return None
    model, loss, x, y = _set_up(problem)
    layers = {"params": list(_named(model, MATRICES))} if problem.only else {}
    extensions = [
        getattr(offered, name)(**arguments, **(layers if name in KRONECKER else {}))
        for name, arguments in quantity.extensions
    ]
    compiled = package.compile(model, loss, extensions=extensions, **options)
    savefields = [extension.savefield for extension in extensions]
    if not quantity.product:
        return Implementation(
            lambda: compiled(x, y),
            _given(model, x, y),
            fields=lambda raw: {field: getattr(raw, field) for field in savefields},
        )
    vectors = _vectors(_named(model, ()))

    def call() -> tuple[Any, Fields]:
        result = compiled(x, y)
        return result, {field: _products(getattr(result, field), vectors) for field in savefields}

    return Implementation(call, _given(model, x, y, *vectors.values()), fields=lambda raw: raw[1])


def backpack(problem: Problem, quantity: Quantity, save_memory: bool = False) -> Implementation | None:
    """BackPACK by its context manager; ``save_memory`` is its other algorithm for convolutions' weights."""
    package = importlib.import_module("backpack")
    offered = importlib.import_module("backpack.extensions")
    second_order = importlib.import_module("backpack.extensions.secondorder.base")
    switch = importlib.import_module("backpack.core.derivatives.convnd").weight_jac_t_save_memory
    if any(not hasattr(offered, name) for name, _ in quantity.extensions):
        return None
    extensions = [getattr(offered, name)(**arguments) for name, arguments in quantity.extensions]
    model, loss, x, y = _set_up(problem)
    if save_memory and not (quantity.save_memory and any(isinstance(m, nn.Conv2d) for m in model.modules())):
        return None
    if problem.only and any(
        isinstance(extension, second_order.SecondOrderBackpropExtension) for extension in extensions
    ):
        raise NotImplementedError("BackPACK has no second order for some of the model's modules")
    for module in model.modules() if problem.only else [model]:
        if not problem.only or isinstance(module, problem.only):
            package.extend(module)
    loss = package.extend(loss)
    params = _named(model, problem.only)
    savefields = [extension.savefield for extension in extensions]
    vectors = _vectors(params) if quantity.product else {}

    def call() -> Fields:
        with switch(save_memory), package.backpack(*extensions):
            loss(model(x), y).backward()
        if not quantity.product:
            return {}
        return {
            field: _products({name: getattr(param, field) for name, param in params.items()}, vectors)
            for field in savefields
        }

    def reset() -> None:
        model.zero_grad()
        for param in params.values():
            for field in savefields:
                if hasattr(param, field):
                    delattr(param, field)
        # The product extensions leave inputs and outputs on the modules, where plain gradients do not.
        for module in [*model.modules(), loss]:
            package.memory_cleanup(module)

    def fields(raw: Fields) -> Fields:
        return raw or {f: {name: getattr(param, f) for name, param in params.items()} for f in savefields}

    note = f"only the parameters of {', '.join(c.__name__ for c in problem.only)}" if problem.only else ""
    return Implementation(call, _given(model, x, y, *vectors.values()), reset, fields, note)


def _square(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.square() for name, grad in grads.items()}


def _sum(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.sum(0) for name, grad in grads.items()}


def _l2(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.flatten(1).square().sum(1) for name, grad in grads.items()}


def _variance(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.var(0, correction=0) for name, grad in grads.items()}


def _clipped(grads: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    norms = sum(_l2(grads).values()).sqrt()
    weights = torch.where(norms > max_norm, max_norm / norms, 1.0)
    return {name: torch.tensordot(weights, grad, 1) for name, grad in grads.items()}


# From per-sample gradients [N, *P] to the fields of a quantity.
REDUCTIONS: dict[str, Callable[[dict[str, Tensor]], Fields]] = {
    "grad": lambda grads: {"grad_batch": grads},
    "l2": lambda grads: {"batch_l2": _l2(grads)},
    "sgs": lambda grads: {"sum_grad_squared": _sum(_square(grads))},
    "variance": lambda grads: {"variance": _variance(grads)},
    "clipped": lambda grads: {"grad_clipped": _clipped(grads, **CLIP)},
    "all": lambda grads: {
        "grad_batch": grads,
        "batch_l2": _l2(grads),
        "sum_grad_squared": _sum(_square(grads)),
        "variance": _variance(grads),
    },
}


def func(problem: Problem, quantity: Quantity, compiled: bool = False) -> Implementation | None:
    """``vmap(grad)`` and the reduction, without the loss and the gradient that the others give beside it."""
    if quantity.func not in REDUCTIONS:
        return None
    model, loss, x, y = _set_up(problem)
    params = {name: param.detach() for name, param in _named(model, ()).items()}
    scale = 1 / len(x)

    def sample_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, params, (x.unsqueeze(0),))
        return loss(output, y.unsqueeze(0)) * scale

    def compute(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Fields:
        per_sample = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))
        return REDUCTIONS[quantity.func](per_sample(params, x, y))

    run = torch.compile(compute, fullgraph=True, dynamic=False) if compiled else compute
    note = "without the loss and the gradient"
    return Implementation(lambda: run(params, x, y), _given(model, x, y), fields=lambda raw: raw, note=note)


def _hessian_block(value: Callable, loss: Callable, param: Tensor, vector: Tensor) -> Tensor:
    return torch.func.jvp(torch.func.grad(lambda p: loss(value(p))), (param,), (vector,))[1]


def _ggn_block(value: Callable, loss: Callable, param: Tensor, vector: Tensor) -> Tensor:
    output, moved = torch.func.jvp(value, (param,), (vector,))
    curved = torch.func.jvp(torch.func.grad(loss), (output,), (moved,))[1]
    return torch.func.vjp(value, param)[1](curved)[0]


# One block of a curvature matrix times a vector, from the model as a function of one parameter.
BLOCKS: dict[str, Callable[[Callable, Callable, Tensor, Tensor], Tensor]] = {"hmp": _hessian_block, "ggnmp": _ggn_block}


def func_products(problem: Problem, quantity: Quantity) -> Implementation | None:
    """``jvp(grad)``, and ``vjp`` of the loss's Hessian times ``jvp``, parameter by parameter."""
    if quantity.func not in BLOCKS:
        return None
    model, loss, x, y = _set_up(problem)
    params = {name: param.detach() for name, param in _named(model, ()).items()}
    vectors = _vectors(_named(model, ()))

    def of(name: str) -> Callable[[Tensor], Tensor]:
        return lambda p: torch.func.functional_call(model, {**params, name: p}, (x,))

    def call() -> Fields:
        product = BLOCKS[quantity.func]
        found = {n: product(of(n), lambda z: loss(z, y), params[n], v[0]).unsqueeze(0) for n, v in vectors.items()}
        return {quantity.func: found}

    note = "without the loss and the gradient"
    return Implementation(call, _given(model, x, y, *vectors.values()), fields=lambda raw: raw, note=note)


def curvlinops(problem: Problem, quantity: Quantity) -> Implementation | None:
    """KFAC of curvlinops: Kronecker factors, of its own weight sharing ("expand") on convolutions."""
    if not quantity.curvlinops:
        return None
    kfac = importlib.import_module("curvlinops").KFACLinearOperator
    model, loss, x, y = _set_up(problem)
    params = list(_named(model, MATRICES if problem.only else ()).values())

    def call() -> Any:
        operator = kfac(
            *(model, loss, params, [(x, y)]),
            **quantity.curvlinops,
            check_deterministic=False,
            num_data=len(x),
            num_per_example_loss_terms=y[0].numel(),
        )
        operator.compute_kronecker_factors()
        return operator

    note = "other scaling of the factors on convolutions"
    return Implementation(call, _given(model, x, y), model.zero_grad, note=note)


BUILDERS: dict[str, Callable[[Problem, Quantity], Implementation | None]] = {
    "fxcurv": fxcurv,
    "backpack": backpack,
    "backpack:save_memory": partial(backpack, save_memory=True),
    "func:vmap": func,
    "func:vmap_compile": partial(func, compiled=True),
    "func:products": func_products,
    "curvlinops": curvlinops,
}


def wanted(families: list[str], backends: list[str]) -> dict[str, Callable[[Problem, Quantity], Implementation | None]]:
    """The builders of these families, the part of a name before the colon, and fxcurv's under these backends too."""
    builders = BUILDERS | importlib.import_module("hook_peers").BUILDERS  # which has what is theirs from here
    found = {name: builder for name, builder in builders.items() if name.partition(":")[0] in families}
    return {**found, **{f"fxcurv:{backend}": partial(fxcurv, backend=backend) for backend in backends}}
