"""Extensions that are written for BackPACK: a quantity per class of module, computed from its input, output and cotangents.

The compiler carries gradients and columns through the model. So a module extension only computes quantities of
parameters, and its `backpropagate` is never called. `fxcurv.backpack.custom` runs module extensions.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.errors import ExtensionError
from fxcurv.extensions import Extension

FAIL_ERROR, FAIL_WARN, FAIL_SILENT = "ERROR", "WARNING", "SILENT"


class ModuleExtension:
    """How a quantity of a module's own parameters is computed.

    For every name in `params` there is a method `name(extension, module, g_inp, g_out, backproped)` that returns what goes
    into the extension's field of that parameter.
    `module` has `input0`, `input1`, … and `output`; `g_out` is (gradient in the output,), `g_inp` the gradients in the
    inputs. `backproped` is None for a first-order extension. For a second-order one it is columns S [V, N, *output],
    with Σ_v S S^T the Gauss-Newton in the output.

    Raises:
        NotImplementedError: if there is no method for one of `params`.
    """

    def __init__(self, params: Sequence[str] | None = None):
        self.params = tuple(params or ())
        missing = [name for name in self.params if not hasattr(self, name)]
        if missing:
            raise NotImplementedError(
                f"{type(self).__name__} has no method {missing[0]}(extension, module, g_inp, g_out, backproped)"
            )


class FirstOrderModuleExtension(ModuleExtension):
    """A module extension of a first-order extension."""


class MatToJacMat(ModuleExtension):
    """Has `self.derivatives`, which takes columns to parameters (`fxcurv.backpack.core.derivatives`)."""

    def __init__(self, derivatives: Any, params: Sequence[str] | None = None):
        super().__init__(params)
        self.derivatives = derivatives


class BackpropExtension(abc.ABC):
    """A quantity with a module extension per class of module. Extensions of `fxcurv.extensions` count as subclasses.

    Args:
        savefield: the field on parameters.
        module_exts: module class -> its `ModuleExtension`.
        fail_mode: "ERROR", "WARNING" or "SILENT", for a module with trainable parameters but no module extension.
        subsampling: indices of the samples that count; None for all.
    """

    def __init__(
        self,
        savefield: str,
        module_exts: dict[type[nn.Module], ModuleExtension],
        fail_mode: str = FAIL_ERROR,
        subsampling: list[int] | None = None,
    ):
        if fail_mode not in (FAIL_ERROR, FAIL_WARN, FAIL_SILENT):
            raise ExtensionError(f"fail_mode={fail_mode!r}: 'ERROR', 'WARNING' or 'SILENT'")
        self.savefield, self.fail_mode, self.module_extensions = savefield, fail_mode, module_exts
        self._subsampling = subsampling

    @abc.abstractmethod
    def expects_backpropagation_quantities(self) -> bool:
        """Whether columns of the loss Hessian's root are wanted at the modules' outputs."""

    def set_module_extension(
        self, module: type[nn.Module], extension: ModuleExtension, overwrite: bool = False
    ) -> None:
        """Let `extension` compute this quantity for parameters of modules of the class `module`."""
        set_module_extension(self, module, extension, overwrite)

    def get_subsampling(self) -> list[int] | None:
        """The indices of the samples that count; None for all."""
        return self._subsampling


BackpropExtension.register(Extension)


class FirstOrderBackpropExtension(BackpropExtension):
    """An extension that reads gradients in the modules' outputs."""

    def __init__(
        self,
        savefield: str,
        module_exts: dict[type[nn.Module], ModuleExtension],
        fail_mode: str = FAIL_WARN,
        subsampling: list[int] | None = None,
    ):
        super().__init__(savefield, module_exts, fail_mode, subsampling)

    def expects_backpropagation_quantities(self) -> bool:
        return False


class SecondOrderBackpropExtension(BackpropExtension):
    """An extension that reads columns of the loss Hessian's root at the modules' outputs.

    `get_loss_hessian_strategy()` says "exact" (the default) or "sampling", of `get_num_mc_samples()` samples.
    """

    def expects_backpropagation_quantities(self) -> bool:
        return True


def set_module_extension(
    extension: Any, module: type[nn.Module], module_extension: ModuleExtension, overwrite: bool = False
) -> None:
    """Let `module_extension` compute `extension` for parameters of modules of the class `module`.

    Raises:
        ValueError: if there is one already.
    """
    if "module_extensions" not in vars(extension):
        object.__setattr__(extension, "module_extensions", {})  # those of `fxcurv.extensions` are frozen
    known = vars(extension)["module_extensions"]
    if module in known and not overwrite:
        raise ValueError(f"{module.__name__} has {known[module]} already: overwrite=True replaces it")
    known[module] = module_extension


class Derivatives:
    """Products with the Jacobians of one module of any class, by autograd sample by sample.

    Args of its methods: `mat` holds columns; `module` has `input0` and `output`, as in a `ModuleExtension`.
    """

    def param_mjp(
        self,
        param_str: str,
        module: nn.Module,
        g_inp: Any,
        g_out: Any,
        mat: Tensor,
        sum_batch: bool = True,
        subsampling: list[int] | None = None,
    ) -> Tensor:
        """J_n^T of a parameter times columns [V, N, *output]: [V, N, *P], or the sum over samples [V, *P]."""

        def of_param(x: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda p: _output_of_sample(module, {param_str: p}, x)

        found = self._transpose(of_param, getattr(module, param_str).detach(), module, mat, subsampling)
        return found.sum(1) if sum_batch else found

    def jac_t_mat_prod(
        self, module: nn.Module, g_inp: Any, g_out: Any, mat: Tensor, subsampling: list[int] | None = None
    ) -> Tensor:
        """J_n^T of the input times columns [V, N, *output]: [V, N, *input]."""

        def columns(x: Tensor, g: Tensor) -> Tensor:
            return torch.func.vmap(torch.func.vjp(lambda x: _output_of_sample(module, {}, x), x)[1])(g)[0]

        return torch.func.vmap(columns, in_dims=(0, 1), out_dims=1)(_samples(module, subsampling), mat)

    def _transpose(self, of: Any, p: Tensor, module: nn.Module, mat: Tensor, subsampling: list[int] | None) -> Tensor:
        def columns(x: Tensor, g: Tensor) -> Tensor:
            return torch.func.vmap(torch.func.vjp(of(x), p)[1])(g)[0]

        return torch.func.vmap(columns, in_dims=(0, 1), out_dims=1)(_samples(module, subsampling), mat)

    @staticmethod
    def _get_additional_dims(module: Any) -> tuple[int, ...]:
        return tuple(module.input0.shape[1:-1])


def _samples(module: Any, subsampling: list[int] | None) -> Tensor:
    x = module.input0.detach()
    return x if subsampling is None else x[subsampling]


def _output_of_sample(module: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The module's output for one sample."""
    out = torch.func.functional_call(module, params, (x[None],))
    return (out[0] if isinstance(out, tuple) else out)[0]
