"""A program checks itself: its first numbers against plain PyTorch (`compile(check="first")`).

This finds what tracing lost and rules that are wrong. The loss, the output, the gradient and new values of buffers are
compared with a plain forward and backward pass of the model as it is, and sums of individual quantities with their totals.
(The third check exchanges samples: `probe`.) The plain pass leaves everything as it found it, and the check changes no result.

* Random ops: the program and the model draw in different orders. So the plain pass, and one more run of the program,
  get the same numbers for every op that draws (`_FixedDraws`).
* Rounding: differences up to `ROUNDING` units of the dtype pass. Where one is larger (a gradient that cancels to zero, a
  norm in float32 inside a float64 model), the plain pass runs twice more with every op's result moved by one unit of its
  dtype (`_Rounded`), which shows how much of a value is rounding.
* Memory: the plain pass runs first, and only its loss, output and gradient stay while the program runs.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.errors import ArgumentError, SelfCheckError
from fxcurv.front.arguments import filled, templated
from fxcurv.front.observers import heard, silent
from fxcurv.front.requests import Request
from fxcurv.front.side_effects import refill
from fxcurv.ir.placement import Shard
from fxcurv.ir.private import (
    TorchDispatchMode,
    hooks_of_tensor,
    own_buffers,
    own_parameters,
    pytree,
    schema_of,
    set_hooks_of_tensor,
)
from fxcurv.ir.program import Program
from fxcurv.passes.recycle import functional
from fxcurv.rules.traits import extreme, rounding
from fxcurv.rules.traits import random as is_random
from fxcurv.runtime.bind import cuda_devices
from fxcurv.runtime.bisect import first_difference
from fxcurv.runtime.sums import Jacobians, Pair, sums, unequal

# Whole numbers below this are taken for exact.
EXACT = 1 << 16
# A value may differ by this many times what rounding of single ops moves it: the order of sums inside an op is unknown.
FACTOR = 64

Values = tuple[Any, list[Tensor], dict[str, Tensor], dict[str, Any], dict[str, Any]]


@dataclass
class Plain:
    """The values of a plain forward and backward pass, by name; `leaves`: the tensors of the output.

    of_output: the part of the gradient that passes through the output, where the loss reads parameters too.
    cotangent, products: a cotangent of an output leaf, and its products with that leaf's derivatives, for `Jacobian`.
    missing: what could not be computed, and why.
    """

    loss: Tensor | None = None
    leaves: list[Tensor] = field(default_factory=list)
    grad: dict[str, Tensor] = field(default_factory=dict)
    of_output: dict[str, Tensor] = field(default_factory=dict)
    products: dict[str, Tensor] = field(default_factory=dict)
    cotangent: Tensor | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    failure: Exception | None = None
    draws: list[torch.Size] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """All values that are compared, under the names that messages give them."""
        found = {"the loss": self.loss} if self.loss is not None else {}
        found |= {f"output {k}" if k else "the output": t for k, t in enumerate(self.leaves)}
        found |= {f"the gradient of '{name}'": t for name, t in self.grad.items()}
        return found | {f"buffer '{name}'": t for name, t in self.buffers.items()}

    def derivatives(self) -> dict[str, Tensor]:
        """The products with the output's derivatives, under names of their own."""
        return {f"the product with '{name}'": t for name, t in self.products.items()}


class SelfCheck:
    """What the check of one program needs, noted after its analysis.

    Attributes:
        forward: the captured forward graph, in which a difference is located; `inputs`: what its placeholders are.
        exchanged: whether `probe` exchanges samples.
        observed: what forward hooks look at; they do not run in a check.
        note: for `explain()`, what was checked.
    """

    def __init__(self, program: Program, exchanged: bool):
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(program.graph, env)
        for old, new in env.items():
            new.meta = dict(old.meta)
        self.forward: fx.GraphModule | None = fx.GraphModule(program.gm, graph)
        self.forward_loss = env.get(program.loss)
        self.exchanged = exchanged
        self.inputs = program.inputs[:]
        self.observed = program.observed[:]
        self.jacobian = self._jacobian_leaf(program)
        self.random = any(draws_numbers(n.target, n.args, n.kwargs) for n in program.graph.nodes)
        self.note = "not yet: at the first call"

    @classmethod
    def again(cls, program: Program, random: bool, jacobian: tuple[int, Shard] | None, made: str) -> SelfCheck:
        """For a program from disk, which another process made and checked; `made`: the note of that check."""
        check = cls.__new__(cls)
        check.forward = check.forward_loss = None  # a difference is not located: the program is made anew
        check.exchanged, check.inputs, check.observed = False, program.inputs[:], []
        check.jacobian, check.random, check.note = jacobian, random, made
        return check

    def _jacobian_leaf(self, program: Program) -> tuple[int, Shard] | None:
        """(index of the output leaf that `Jacobian` differentiates, its placement), if there is exactly one."""
        if len(program.heads) != 1 or program.heads[0] not in program.output_leaves:
            return None
        place = program.heads[0].meta.get("place")
        return (program.output_leaves.index(program.heads[0]), place) if isinstance(place, Shard) else None

    def begin(self, program: Program, request: Request, flat: list[Any], hooks: dict[Any, Any] | None = None) -> Check:
        """Run the plain passes, before the program runs; `hooks`: forward hooks that run in them, and only look."""
        return Check(self, program, request, flat, hooks)


class Check:
    """One check: made before the program runs, finished with what it returned."""

    def __init__(
        self, known: SelfCheck, program: Program, request: Request, flat: list[Any], hooks: dict[Any, Any] | None = None
    ):
        self.known, self.program, self.request, self.flat = known, program, request, flat
        self.hooks = hooks or {}
        self.model, self.loss, self.arguments = request.subject.model, request.subject.loss, request.arguments
        self.notes: list[str] = []
        self.compared: list[str] = []
        self.summed: list[str] = []
        self._noise: dict[str, Tensor] | None = None
        start = time.perf_counter()
        self.plain = self.run()
        if known.random and self.plain.failure is None:
            self._compare_same_draws()
        self.seconds = time.perf_counter() - start

    def finish(self, values: tuple) -> None:
        """Compare what the program returned.

        Raises:
            SelfCheckError: naming what differs, and where.
            ArgumentError: if the model itself fails on the arguments.
        """
        self.compare(self.program.unpack(values, lambda t: t))

    def compare(self, unpacked: Values) -> None:
        """See `finish`; `unpacked`: as `Program.unpack` gives it."""
        start = time.perf_counter()
        if self.plain.failure is not None:
            error = self.plain.failure
            raise ArgumentError(
                f"the model or its loss fails on these arguments without fxcurv: {type(error).__name__}: {error}\n"
                "Way out: arguments that they take (values in the support of a distribution, say); check=None leaves this unseen."
            ) from error
        if self.known.random:  # this call drew its own numbers: they are compared among themselves
            what, summed = self.compared, self._sums(unpacked, None) + self.summed
        else:
            what, summed = self._compare(unpacked, self.plain, ""), self._sums(unpacked, self.plain)
        seconds = self.seconds + time.perf_counter() - start
        self.known.note = self._make_note(what, summed, seconds)

    def _make_note(self, what: list[str], summed: list[str], seconds: float) -> str:
        said = f"{', '.join(what)} equal those of plain PyTorch" if what else "nothing compared with plain PyTorch"
        said += f"; sums agree for {', '.join(dict.fromkeys(summed))}" if summed else ""
        said += "; samples exchanged" if self.known.exchanged else ""
        missing = list(dict.fromkeys([*self.plain.missing, *self.notes]))
        said += f". NOT compared: {'; '.join(missing)}" if missing else ""
        return f"{said} (took {1000 * seconds:.0f} ms)"

    # ---- the plain passes ----

    def drawing(self) -> contextlib.AbstractContextManager:
        """A context in which random ops draw the same numbers on both sides."""
        return _FixedDraws() if self.known.random else contextlib.nullcontext()

    def run(self, *, rounded: int | None = None, watch: Callable[[nn.Module], Any] | None = None) -> Plain:
        """A plain forward and backward pass; nothing that it writes stays.

        Args:
            rounded: seed of the noise, if all ops round their results randomly.
            watch: is called with the model before the pass, and may put hooks on its modules.
        """
        plain = Plain()
        draws = _FixedDraws() if self.known.random else None
        modules = self.request.subject.modules()
        params = [p for m in modules for p in own_parameters(m).values() if p is not None]
        functions = [] if self.loss is None or isinstance(self.loss, nn.Module) else [self.loss]
        with contextlib.ExitStack() as stack:
            stack.enter_context(_restoring(modules, params, functions, cuda_devices(self.flat)))
            stack.enter_context(silent(self.known.observed, modules))
            stack.enter_context(heard(self.hooks, modules))
            if watch is not None:
                watch(self.model)
            stack.enter_context(torch.enable_grad())
            if draws is not None:
                stack.enter_context(_math_only())
                stack.enter_context(draws)
            if rounded is not None:
                stack.enter_context(_Rounded(rounded))
            self._pass(plain)
            if plain.leaves:  # a pass that broke off has updated some of them only
                plain.buffers = {n: t.detach() for n, t in self.model.named_buffers(remove_duplicate=False)}
        plain.draws = draws.shapes if draws is not None else []
        return plain

    def _pass(self, plain: Plain) -> None:
        inputs, targets = ([_detach(t) for t in part] for part in (self.arguments.inputs, self.arguments.targets))
        args, kwargs = filled(self.arguments.input_template, inputs)
        targets = filled(self.arguments.target_template, targets)
        mode = self.request.mode
        autocast = functools.partial(
            torch.autocast, mode.device_type, mode.dtype, enabled=mode.dtype is not None, cache_enabled=False
        )
        leaves: list[Tensor] = []
        try:
            with autocast():
                output = self.model(*args, **kwargs)
                template = templated(output, leaves)
                loss = self.loss(output, *targets) if self.loss is not None else None
        except torch.OutOfMemoryError:
            plain.missing.append("all, for want of memory")
            return
        except Exception as error:  # whatever the user's code raises
            plain.failure = error
            return
        plain.loss = loss.detach().reshape(()) if loss is not None else None
        plain.leaves = [t.detach() for t in leaves]
        try:
            self._backward(plain, loss, leaves, template, targets, autocast)
        except torch.OutOfMemoryError:
            plain.missing.append("the gradient, for want of memory")
        except (RuntimeError, NotImplementedError) as error:
            plain.missing.append(f"the gradient, which plain autograd refuses ({_first_line(error)})")

    def _backward(self, plain: Plain, loss, leaves, template, targets, autocast) -> None:
        named = dict(self.request.subject.named_parameters())
        params = _with_group_norm(self.model, {name: named[name] for name in self.program.params}, named)
        asked = {type(e).__name__ for e in self.program.extensions}
        if self.known.jacobian is not None and "Jacobian" in asked:
            leaf = leaves[self.known.jacobian[0]]
            angles = torch.arange(1, leaf.numel() + 1, device=leaf.device, dtype=torch.float32)
            plain.cotangent = angles.cos().to(leaf.dtype).reshape(leaf.shape)
            plain.products = _grads([leaf], params, [plain.cotangent], retain_graph=loss is not None)
        if self.loss is None:
            return
        direct = bool(self.program.walked.direct) and any(e.per_sample for e in self.program.extensions)
        grad = _grads([loss.reshape(())], params, None, retain_graph=direct)
        plain.grad = {name: g for name, g in grad.items() if name in self.program.results.get("grad", {})}
        if direct and not self.program.options.split and not self.program.analysis.ends:
            apart = [t.detach().requires_grad_(t.requires_grad) for t in leaves]
            with autocast():
                again = self.loss(filled(template, apart), *targets)
            heads = [k for k, t in enumerate(apart) if t.requires_grad]
            gs = torch.autograd.grad(again, [apart[k] for k in heads], allow_unused=True)
            read = [(leaves[k], g) for k, g in zip(heads, gs, strict=True) if g is not None]
            plain.of_output = _grads([f for f, _ in read], params, [g for _, g in read])

    def _compare_same_draws(self) -> None:
        """Run the program once more, with the draws of the plain pass, and compare."""
        draws = _FixedDraws()
        with torch.random.fork_rng(cuda_devices(self.flat)), torch.no_grad(), draws:
            values = functional(self.program)(*self.flat)
        unpacked = self.program.unpack(values, lambda t: t)
        same = sorted(draws.shapes) == sorted(self.plain.draws)
        if same:
            self.compared = self._compare(unpacked, self.plain, "with the same random draws on both sides, ")
            self.summed = self._sums(unpacked, self.plain)
            return
        pairs = self._pairs(unpacked, self.plain)
        differing = set(unequal(pairs))
        self.compared = [] if differing else self._kinds(pairs)
        if differing:
            self.notes.append(
                f"values behind random ops ({len(self.plain.draws)} draws in the model, {len(draws.shapes)} in the program, "
                "of other shapes)"
            )

    # ---- comparing ----

    def _set_by_calls(self) -> list[tuple[int, str]]:
        """(module, name) of what every call sets to what the program returned, once it is checked."""
        return [(look.module, look.attribute) for look in self.known.observed if look.attribute]

    def _pairs(self, unpacked: Values, plain: Plain) -> list[Pair]:
        loss, leaves, mutations, results, _ = unpacked
        grads = results.get("grad", {})
        paths = {id(m): f"{path}." if path else "" for path, m in self.model.named_modules(remove_duplicate=False)}
        modules = self.request.subject.modules()
        later = {f"{paths.get(id(modules[k]))}{name}" for k, name in self._set_by_calls()}
        own = {n: t for n, t in self.model.named_buffers(remove_duplicate=False) if n not in later}
        got = {"the loss": loss} | {f"output {k}" if k else "the output": t for k, t in enumerate(leaves)}
        got |= {f"the gradient of '{name}'": t for name, t in grads.items()}
        got |= {f"buffer '{name}'": mutations.get(name, t) for name, t in own.items()}
        return [Pair(name, got[name], want) for name, want in plain.tensors().items() if got.get(name) is not None]

    def _kinds(self, pairs: list[Pair]) -> list[str]:
        names = [p.name for p in pairs]
        kinds = {"loss": "the loss", "output": "the output", "gradient": "the gradient of", "buffers": "buffer"}
        return [kind for kind, start in kinds.items() if any(n.startswith(start) for n in names)]

    def _compare(self, unpacked: Values, plain: Plain, how: str) -> list[str]:
        """Compare with the plain pass, and return the kinds of values that were compared; `how`: begins the message."""
        pairs = self._pairs(unpacked, plain)
        suspects = unequal(pairs)
        if suspects:
            noise = self.noise()
            left = [p for p in pairs if p.name in suspects]
            gradients = [p.name for p in left if p.name.startswith("the gradient")]
            left = [p.within(FACTOR * noise[p.name]) if p.name in noise else p for p in left]
            suspects = unequal(left, gradients)
        if suspects:
            raise self._error(suspects, {p.name: p for p in pairs}, how)
        return self._kinds(pairs)

    def noise(self) -> dict[str, Tensor]:
        """name -> how far rounding of single ops moves each of the plain pass's values, at most (0-dim).

        Rounded passes are compared with each other: an op that gives something else under the mode that rounds, such as no
        gradient, would have everything pass for rounding.
        """
        if self._noise is None:
            runs = (self.run(rounded=seed) for seed in (1, 2, 3))
            first, *others = (plain.tensors() | plain.derivatives() for plain in runs)
            found = collections.defaultdict(list)
            for name, t in ((name, t) for other in others for name, t in other.items()):
                if name in first and t.is_floating_point() and t.numel() and t.shape == first[name].shape:
                    found[name].append((t - first[name]).abs().nan_to_num(0.0, 0.0, 0.0).max().double())
            self._noise = {name: torch.stack(moved).amax() for name, moved in found.items()}
        return self._noise

    def _error(self, suspects: list[str], pairs: dict[str, Pair], how: str) -> SelfCheckError:
        known = {"the loss", "the output", *(n for n in pairs if n.startswith("output "))}
        forward = [name for name in suspects if name in known]
        first = forward or suspects
        more = f" (and {len(suspects) - 1} more)" if len(suspects) > 1 else ""
        if self.hooks:
            looks = next(look.title for look in self.known.observed if look.where in self.hooks)
            return SelfCheckError(
                f"{how}{pairs[first[0]].said()}{more}.\n{looks} returns nothing, and so runs after the program, to look at "
                "values; the model reads what it, or another such hook, has written. Way out: a hook that changes values returns "
                "them always; or remove it while fxcurv runs."
            )
        with contextlib.suppress(Exception):  # the search only helps: the error has to be raised without it, too
            where = first_difference(self, bool(forward), pairs, [n for n in suspects if n.startswith("the gradient")])
            return SelfCheckError(f"{where}\n{how}{pairs[first[0]].said()}{more}.\n{REPORT}")
        return SelfCheckError(f"{how}{pairs[first[0]].said()}{more}.\n{REPORT}")

    def _sums(self, unpacked: Values, plain: Plain | None) -> list[str]:
        """Check the identities of `sums`, and return the extensions that they are about."""
        results, extras = unpacked[3:]
        program = self.program
        direct = set(program.walked.direct)
        grads = dict(results.get("grad", {}))  # which was compared with the plain one before
        for name in direct & grads.keys():
            grads.pop(name)
        if plain is not None:
            grads |= {name: plain.of_output[name] for name in direct & plain.of_output.keys()}
            if direct - grads.keys() and any(e.per_sample for e in program.extensions):
                self.notes.append(f"sums over samples for {sorted(direct - grads.keys())}, which the loss reads itself")
        jacobians = None
        if plain is not None and plain.cotangent is not None and self.known.jacobian is not None:
            jacobians = Jacobians(plain.cotangent, plain.products, self.known.jacobian[1])
        pairs = sums(program, results, extras, grads, direct, jacobians, self.arguments.batch_size)
        suspects = unequal(pairs)
        if suspects:
            noise = self.noise()
            left = [p for p in pairs if p.name in suspects]
            of = {"Jacobian": "product with"}
            left = [p.excused(FACTOR, noise.get(f"the {of.get(p.extension, 'gradient of')} '{p.param}'")) for p in left]
            suspects = unequal(left)
        if suspects:
            pair = next(p for p in pairs if p.name == suspects[0])
            raise SelfCheckError(f"{_describe_decision(program, pair)}{pair.said()}.\n{REPORT}")
        return [p.extension for p in pairs]


REPORT = (
    "The numbers of this program cannot be trusted, so none are returned. Way out: report it, please, with the model and this "
    "message; a rule of yours in rules= is the first suspect; check=None turns the check off, if you know better."
)


def _describe_decision(program: Program, pair: Pair) -> str:
    """The rule and the algorithm that computed the quantity of a pair."""
    found = [d for d in program.decisions if d.param == pair.param and d.extension == pair.extension]
    return "".join(
        f"{d.extension} of '{d.param}', by the rule of {d.rule} and the algorithm {d.algorithm}:\n" for d in found[:1]
    )


def _with_group_norm(model: nn.Module, params: dict[str, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """`params`, and if one of them is a group norm's, all parameters that are trained.

    On a CPU, PyTorch's kernel for the backward of group norm is sound when all of its gradients are asked for, but not
    for every subset of them.
    """
    own = {id(p) for m in model.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters(recurse=False)}
    if not own & set(map(id, params.values())):
        return params
    return params | {name: p for name, p in named.items() if p.requires_grad}


def _grads(
    outputs: Sequence[Tensor], params: dict[str, Tensor], gs: Any, retain_graph: bool = False
) -> dict[str, Tensor]:
    pairs = [(f, None if gs is None else g) for f, g in zip(outputs, gs or outputs, strict=True) if f.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(p) for name, p in params.items()}
    outs, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outs, list(params.values()), None if gs is None else cotangents, allow_unused=True, retain_graph=retain_graph
    )
    grads = zip(params.items(), found, strict=True)  # those of Embedding(sparse=True) are sparse
    return {n: torch.zeros_like(p) if g is None else g.detach().to_dense() for (n, p), g in grads}


def _detach(t: Tensor) -> Tensor:
    """An argument as capture has it: detached from the caller's graph, and one that autograd may save."""
    return t.clone() if t.is_inference() else t.detach().requires_grad_(t.requires_grad and t.is_leaf)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- leaving no trace ----


@contextlib.contextmanager
def _restoring(modules: list[nn.Module], params: list[Tensor], functions: list[Any], cuda: list[int]) -> Iterator[None]:
    """Put back what a plain pass changes.

    These are buffers (they run on copies), attributes, lists and dicts that forward or a hook writes to, hooks of parameters
    (they do not fire), and random states.
    """
    attributes = [(m, dict(vars(m))) for m in modules]
    hooks = {id(p): (p, hooks_of_tensor(p)) for p in params}
    containers = _containers(modules, functions)
    numpy = sys.modules.get("numpy")
    state = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(cuda):
        try:
            _run_on_copies(modules)
            for p, _ in hooks.values():
                set_hooks_of_tensor(p, None)
            yield
        finally:
            for module, old in attributes:
                vars(module).clear()
                vars(module).update(old)
            for container, old in containers:
                refill(container, old)
            for p, old in hooks.values():
                set_hooks_of_tensor(p, old)
            random.setstate(state[0])
            if numpy is not None:
                numpy.random.set_state(state[1])


def _run_on_copies(modules: list[nn.Module]) -> None:
    """Replace buffers, and plain tensors kept as attributes, by copies; one tensor in several places by one copy."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        for table in (own_buffers(module), vars(module)):
            for name, t in list(table.items()):
                if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and not t.requires_grad:
                    table[name] = copies.setdefault(id(t), t.clone())


CONTAINERS = (list, dict, set, collections.deque)


def _containers(modules: list[nn.Module], functions: list[Any]) -> list[tuple[Any, Any]]:
    """(list, dict, set or deque that the model, its hooks or the loss can write to, a copy of it)."""
    found: dict[int, tuple[Any, Any]] = {}
    stack: list[Any] = [value for m in modules for value in vars(m).values()]
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for function in (*functions, *(f for m in modules for t in tables for f in getattr(m, t, {}).values())):
        stack += _reachable(function)
    while stack:
        value = stack.pop()
        if isinstance(value, CONTAINERS) and id(value) not in found:
            found[id(value)] = value, value.copy()
            stack += value.values() if isinstance(value, dict) else value
    return list(found.values())


def _reachable(function: Any) -> list[Any]:
    """What a function can write to: closures, the object that it belongs to, globals that it names."""
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords.values(), *_reachable(function.func)]
    owner = getattr(function, "__self__", None)
    found = (
        []
        if owner is None or isinstance(owner, nn.Module) or not hasattr(owner, "__dict__")
        else [*vars(owner).values()]
    )
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        return found + ([*vars(function).values()] if hasattr(function, "__dict__") else [])
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found + [function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__]


# ---- draws and rounding ----


def draws_numbers(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers; attention without dropout does not, though its kernels count as random."""
    if not is_random(op):
        return False
    named = {a.name: value for a, value in zip(schema_of(op).arguments, args, strict=False)} | dict(kwargs)
    optional = [a.default_value for a in schema_of(op).arguments if a.name == "dropout_p"]
    return not optional or named.get("dropout_p", optional[0]) != 0


@contextlib.contextmanager
def _math_only() -> Iterator[None]:
    """Run attention and recurrent layers as the ops that capture sees, not by kernels that draw inside."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


class _FixedDraws(TorchDispatchMode):
    """Every op that draws starts from one state and fills its values in order, whatever ran before or their layout."""

    def __init__(self):
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not draws_numbers(func, args, kwargs):
            return func(*args, **kwargs)
        torch.manual_seed(0)
        given = pytree.tree_map_only(Tensor, Tensor.contiguous, args)
        out = func(*given, **kwargs)
        self.shapes += [t.shape for t in pytree.tree_leaves(out)[:1] if isinstance(t, Tensor)]
        schema = schema_of(func)
        if schema.is_mutable:
            for old, new in zip(pytree.tree_leaves(args), pytree.tree_leaves(given), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)
        in_place = any(r.alias_info is not None for r in schema.returns)  # false if the op writes only to its noise
        return args[0] if in_place else out


class _Rounded(TorchDispatchMode):
    """Moves every op's result as far as rounding may, to see how far rounding can move a value."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        reads = any(isinstance(t, Tensor) for t in pytree.tree_leaves(args))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema_of(func).returns)
        if not reads or views or extreme(func, args):
            return out
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point() and t.numel():
                self._move(t, rounding(func, args, t))
        return out

    def _move(self, t: Tensor, units: Tensor) -> None:
        if any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True)):
            return  # an expanded result has no memory of its own
        if t.device not in self.generators:
            self.generators[t.device] = torch.Generator(t.device).manual_seed(self.seed)
        wide = t.dtype if t.dtype in (torch.float32, torch.float64) else torch.float32
        noise = torch.rand(t.shape, generator=self.generators[t.device], device=t.device, dtype=wide) * 2 - 1
        moved = t + units * noise * unit(t)
        # A mask's infinity, or largest number, would become NaN, and so would all that follows; a number of a mask or a
        # count is exact, and 1 - mask times the largest number shows it.
        exact = (t == t.round()) & (t.abs() < EXACT)
        t.copy_(moved.where(moved.isfinite() & ~exact, t))


def unit(t: Tensor) -> float:
    """The relative rounding of an op's result on this device; tensor cores keep ten bits of float32."""
    reduced = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    if t.is_cuda and t.dtype is torch.float32 and reduced:
        return 2.0**-11
    return torch.finfo(t.dtype).eps
