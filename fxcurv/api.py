"""`compile`, what it returns, and what a call returns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcurv import passes
from fxcurv.capture import Arguments, Slot, capture, flatten_arguments, map_leaves
from fxcurv.errors import ArgumentError, ExtensionError
from fxcurv.extensions import Extension
from fxcurv.program import Program, specialise

log = logging.getLogger("fxcurv")


def compile(  # noqa: A001
    model: nn.Module,
    loss: Callable[..., Tensor] | None,
    extensions: Iterable[Extension] = (),
    *,
    batch_dim: Any = 0,
    split: str | None = None,
    rules: dict | None = None,
    update_buffers: bool = True,
    debug: bool = False,
) -> Compiled:
    """Compile `model` and `loss` for a set of quantities.

    Args:
        model: any module that `torch.export` can trace.
        loss: `loss(output, *targets) -> scalar`, a module or a callable; None for `Jacobian` alone.
        extensions: instances of classes in `fxcurv.extensions`.
        batch_dim: the samples' dimension in the inputs: an int, or one per input (tuple, or dict by keyword), None for an
            input without samples.
        split: path of the submodule whose output is f (default: the model's output).
        rules: {op: Rule}, which override registered ones.
        update_buffers: write what training mode updates (running statistics) to the model, as a forward pass would;
            otherwise it is returned as `result.buffers`.
        debug: verify the program between passes and check values at every call.

    Returns:
        a callable `compiled(inputs, *targets, seed=None, generator=None) -> Result`; it traces at the first call for each
        kind of input.

    Raises:
        ExtensionError: for a class instead of an instance, an unknown extension, or one asked for twice.
        ArgumentError: if `model` is no module or has no trainable parameter.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}, not an nn.Module: wrap it in one")
    if loss is not None and not callable(loss):
        raise ArgumentError(f"loss is a {type(loss).__name__}, not callable: pass a module or a function (output, target)")
    found = _checked(extensions)
    if loss is None and any(not _needs_no_loss(e) for e in found):
        names = ", ".join(type(e).__name__ for e in found if not _needs_no_loss(e))
        raise ArgumentError(f"{names} need a loss: pass one as the second argument")
    return Compiled(model, loss, found, batch_dim, split, dict(rules or {}), update_buffers, debug)


def _needs_no_loss(extension: Extension) -> bool:
    from fxcurv.quantity import Identity

    return isinstance(extension.requires, Identity)


def _checked(extensions: Iterable[Extension]) -> tuple[Extension, ...]:
    if isinstance(extensions, Extension):
        extensions = (extensions,)
    found: list[Extension] = []
    for e in extensions:
        if isinstance(e, type) and issubclass(e, Extension):
            raise ExtensionError(f"{e.__name__} is a class: pass an instance, {e.__name__}()")
        if not isinstance(e, Extension):
            raise ExtensionError(f"{e!r} is no extension: pass instances of the classes in fxcurv.extensions")
        same = [f for f in found if f.savefield == e.savefield]
        if same:
            raise ExtensionError(
                f"{same[0]} and {e} both save to '{e.savefield}': drop one, or give one another savefield="
            )
        if e.savefield in ("loss", "output", "grad", "buffers"):
            raise ExtensionError(f"{e} saves to '{e.savefield}', which every result has: give it another savefield=")
        found.append(e)
    return tuple(found)


class Result:
    """What a call returns: a registered pytree.

    Attributes:
        loss: the loss, 0-dim.
        output: the model's output, in its own structure.
        grad: parameter name -> gradient.
        buffers: buffer name -> new value, if buffers are not updated.
        <savefield>: for every extension, parameter name -> value.
    """

    def __init__(self, fields: dict[str, Any], extensions: tuple[Extension, ...], model: nn.Module | None):
        self._fields, self._extensions, self._model = fields, extensions, model

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("_fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"the result has no '{name}': it has {', '.join(fields)}")

    def __getitem__(self, extension: Extension) -> Any:
        """The field of an extension instance."""
        if extension not in self._extensions:
            raise KeyError(f"{extension} was not asked for")
        return self._fields[extension.savefield]

    def __dir__(self):
        return [*super().__dir__(), *self._fields]

    def __repr__(self) -> str:
        return f"Result({', '.join(self._fields)})"

    def attach(self) -> Result:
        """Put the results on the parameters: `p.grad` (accumulating, as `backward()` does) and `p.<savefield>`."""
        named = dict(self._model.named_parameters())
        for name, gradient in self._fields.get("grad", {}).items():
            p = named[name]
            p.grad = gradient if p.grad is None else p.grad + gradient
        for extension in self._extensions:
            for name, value in self._fields[extension.savefield].items():
                setattr(named[name], extension.savefield, value)
        return self


def _flatten_result(result: Result):
    names = list(result._fields)
    return [result._fields[n] for n in names], (tuple(names), result._extensions, result._model)


def _unflatten_result(values, context) -> Result:
    names, extensions, model = context
    return Result(dict(zip(names, values, strict=True)), extensions, model)


pytree.register_pytree_node(Result, _flatten_result, _unflatten_result)


class Compiled:
    """A model and loss, compiled for a set of quantities; programs are made per kind of input and cached."""

    def __init__(self, model, loss, extensions, batch_dim, split, rules, update_buffers, debug):
        self.model, self.loss, self.extensions = model, loss, extensions
        self._batch_dim, self._split, self._rules = batch_dim, split, rules
        self._update_buffers, self._debug = update_buffers, debug
        self._programs: dict[Any, list[Program]] = {}
        self._checked: set[int] = set()

    def __call__(self, inputs: Any, *targets: Any, seed: int | Tensor | None = None, generator=None) -> Result:
        """Compute all quantities on one batch.

        Args:
            inputs: a tensor, or a tuple (positional) or dict (keyword) of tensors.
            targets: passed to the loss after the model's output, as they are.
            seed: int or 0-dim integer tensor for sampled columns; the same seed gives the same columns.
            generator: a `torch.Generator` that draws the seed. With neither, the default generator does.

        Raises:
            FxcurvError: see `fxcurv.errors`; nothing on the model has changed then.
        """
        arguments = flatten_arguments(inputs, targets, self._batch_dim)
        program = self._program(arguments)
        flat = self._bind(program, arguments, seed, generator)
        with torch.no_grad():
            if self._debug or id(program) not in self._checked:
                self._check(program, flat)
            values = program.gm(*flat)
        return self._result(program, values)

    def lower(self, inputs: Any, *targets: Any) -> Program:
        """The program for this kind of input."""
        return self._program(flatten_arguments(inputs, targets, self._batch_dim))

    def explain(self, inputs: Any, *targets: Any):
        """A report: per parameter the rule, the algorithm, FLOPs and bytes; totals; the columns carried."""
        from fxcurv.report import Report

        return Report(self.lower(inputs, *targets))

    def _program(self, arguments: Arguments) -> Program:
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ArgumentError("the model has no trainable parameter: set requires_grad on some")
        n = arguments.batch_size
        programs = self._programs.setdefault(self._key(arguments), [])
        for program in programs:
            if program.serves(n):
                return program
        program = self._lower(arguments)
        log.info("compiled for batch size %d (%s)", n, "symbolic" if program.batch.symbols else "fixed")
        programs.append(program)
        return program

    def _key(self, arguments: Arguments) -> Any:
        def describe(leaf, batch_dim):
            if not isinstance(leaf, Tensor):
                return (type(leaf), leaf)
            n = arguments.batch_size
            sizes = tuple((s // n, "n") if n > 1 and s % n == 0 else s for s in leaf.shape)
            shape = tuple("n" if d == batch_dim else s for d, s in enumerate(leaf.shape)) if batch_dim is not None else sizes
            return (shape, leaf.dtype, leaf.device)

        leaves = [describe(leaf, d) for leaf, d in zip(arguments.inputs, arguments.batch_dims, strict=True)]
        leaves += [describe(leaf, None) for leaf in arguments.targets]
        specs = str(arguments.input_spec), str(arguments.target_spec)
        flags = tuple(m.training for m in self.model.modules())
        params = tuple((name, p.requires_grad, p.dtype, p.device, p.shape) for name, p in self.model.named_parameters())
        return (tuple(leaves), specs, flags, params, arguments.batch_size == 1)

    def _lower(self, arguments: Arguments) -> Program:
        n = arguments.batch_size
        program = self._analyse(_doubled(arguments) if n == 1 else arguments)
        if n == 1:
            program = specialise(program, 1)
        return passes.run(program, passes.PIPELINE, self._debug)

    def _analyse(self, arguments: Arguments) -> Program:
        program = capture(self.model, self.loss, arguments, self._split)
        program.extensions, program.rules = self.extensions, self._rules
        program.state["batch_dims"] = arguments.batch_dims
        return passes.run(program, passes.ANALYSIS, self._debug)

    def _bind(self, program: Program, arguments: Arguments, seed, generator) -> list[Any]:
        params = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        flat: list[Any] = []
        for bound in program.inputs:
            if bound.kind == "param":
                flat.append(params[bound.name])
            elif bound.kind == "buffer":
                flat.append(buffers[bound.name])
            elif bound.kind == "constant":
                flat.append(program.constants[bound.name])
            elif bound.kind == "seed":
                flat.append(_seed(seed, generator, next(iter(params.values())).device))
            else:
                flat.append((arguments.inputs if bound.kind == "input" else arguments.targets)[bound.index])
        return flat

    def _check(self, program: Program, flat: list[Any]) -> None:
        holds = program.check_module(*flat) if program.check_module is not None else ()
        for held, error in zip(holds, program.verdicts, strict=True):
            if not bool(held):
                raise error()
        self._checked.add(id(program))

    def _result(self, program: Program, values: tuple) -> Result:
        loss, leaves, mutations, results, extras = program.unpack(values)
        fields: dict[str, Any] = {} if loss is None else {"loss": loss}
        fields["output"] = map_leaves(program.output_template, Slot, lambda slot: leaves[slot.index])
        fields.update(results)
        fields.update(extras)
        if not self._update_buffers:
            fields["buffers"] = mutations
        else:
            buffers = dict(self.model.named_buffers())
            for name, value in mutations.items():
                buffers[name].copy_(value)
        return Result(fields, self.extensions, self.model)


def _seed(seed: int | Tensor | None, generator, device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.long)
    if seed is not None:
        return torch.tensor(seed, dtype=torch.long, device=device)
    where = generator.device if generator is not None else "cpu"
    return torch.randint(0, 2**62, (), generator=generator, device=where).to(device)


def _doubled(arguments: Arguments) -> Arguments:
    """A batch of one sample twice: export would fix a batch size of 1."""
    inputs = [
        torch.cat([leaf, leaf], d) if isinstance(leaf, Tensor) and d is not None else leaf
        for leaf, d in zip(arguments.inputs, arguments.batch_dims, strict=True)
    ]
    targets = [torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t for t in arguments.targets]
    return Arguments(inputs, targets, arguments.input_spec, arguments.target_spec, arguments.batch_dims)
