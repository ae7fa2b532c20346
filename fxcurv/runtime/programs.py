"""Find or make the program for a call: capture, analysis, pipeline, and a cache of programs."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, Protocol, TypeVar

import torch

from fxcurv import passes
from fxcurv.errors import ArgumentError, CaptureError, ExtensionError, FxcurvError, LossError, UnsupportedOpError
from fxcurv.extensions import Extension
from fxcurv.extensions.parameters import Choice, Named, chosen
from fxcurv.front.arguments import Arguments, flatten_arguments
from fxcurv.front.capture import capture
from fxcurv.front.guards import no_complaints
from fxcurv.front.observers import refuse_observers
from fxcurv.front.python_state import Path, reasons
from fxcurv.front.requests import Autocast, Request, Subject, check_trainable
from fxcurv.front.schedules import Schedule
from fxcurv.ir.heap import uncollected
from fxcurv.ir.private import compile_lock
from fxcurv.ir.program import Program
from fxcurv.ir.specialise import specialise
from fxcurv.ir.state import Options
from fxcurv.rules.base import FAILURES
from fxcurv.runtime import forward
from fxcurv.runtime.bind import bind, cuda_devices
from fxcurv.runtime.keys import Key, key_of, shortened, why
from fxcurv.runtime.lengths import Varying, asked, differing, lengths_of, not_served, serves, to_capture, union, without
from fxcurv.runtime.memory import Storage
from fxcurv.runtime.merged import Merged
from fxcurv.runtime.probe import Probe
from fxcurv.runtime.progress import progress, silent
from fxcurv.runtime.selfcheck import SelfCheck
from fxcurv.runtime.shared import Finished, find, graph_key, keep
from fxcurv.runtime.stateless import Stateless

log = logging.getLogger("fxcurv")

Tell = Callable[[str], None]


class Made(Protocol):
    """What `Programs` makes for a kind of input: a program, and what its owner keeps with it."""

    program: Program


M = TypeVar("M", bound=Made)
T = TypeVar("T")


@dataclass(eq=False)
class Ready:
    """A finished program, and all that calls of it leave behind.

    (Not frozen, and with plain attributes only: Dynamo reads `stateless`.)

    Attributes:
        pool: the memory of earlier results.
        probe: checks placements at the first call; `selfcheck`: compares numbers there; each if requested.
        checked: conditions on values and placements have held; `verified`: so has the comparison.
        runner: runs the program under another backend than "eager".
        stateless: the program as calls inside `torch.compile` need it.
        size: (batch size, lengths) of the last call that went the long way, `runtime.call`.
        digest: a number that ranks compare, where each has a part of the batch.
        finished: the part that other models with an equal graph share.
        kept: whether it is on disk or why not, "" while that is open; `loaded`: the file that it was read from.
    """

    program: Program
    pool: Storage
    probe: Probe | Merged | None = None
    selfcheck: SelfCheck | None = None
    checked: bool = False
    verified: bool = False
    runner: Callable[[list[Any]], tuple] | None = None
    stateless: Stateless | None = None
    size: Any = None
    digest: int = 0
    finished: Finished | None = None
    kept: str = ""
    loaded: str = ""

    @classmethod
    def adopted(cls, finished: Finished, captured: Program) -> Ready:
        """For another model, from the program finished for an equal one."""
        program, probe, selfcheck = finished.adopted(captured)
        return cls(program, Storage(program), probe, selfcheck, finished=finished)

    def shared(self, key: Hashable | None) -> Ready:
        """Let equal models find this by `key`; called before its first call."""
        self.finished = keep(key, Finished.of(self.program, self.probe, copy.copy(self.selfcheck)))
        return self

    @property
    def note(self) -> str:
        """What was compared, for a report."""
        return self.selfcheck.note if self.selfcheck is not None else "off"


def emitted(program: Program, tell: Tell) -> Ready:
    """Run the pipeline on an analysed program; the checks keep a copy of its forward graph."""
    kind = Probe if program.options.sample_index is None else Merged
    probe = kind(program) if program.options.check else None
    selfcheck = SelfCheck(program, probe.needed) if probe is not None and program.options.check != "probe" else None
    if not program.options.outputs:
        program.output_leaves, program.output_template = [], None
    program = passes.run(program, passes.pipeline(program.options), program.options.debug, tell)
    return Ready(program, Storage(program), probe, selfcheck)


class Folder(Protocol):
    """Programs that outlive the process (`runtime.disk`)."""

    def find(self, request: Request, key: Key, extensions: tuple, options: Options) -> Any:
        """The program for these arguments and the present Python values, if there is one."""

    def keep(self, ready: Any, request: Request, key: Key, extensions: tuple, options: Options) -> None:
        """Write a program that has served a call to the folder, or note why not."""

    def distrust(self, ready: Any, wrong: bool) -> None:
        """Never read this program's file again; `wrong`: delete it."""


class Programs(Generic[M]):
    """The programs of a subject, one per kind of input.

    Each request brings its subject; it may be made of other objects, as long as they compute the same.

    Args:
        finish: turns an analysed program into what a call needs.
        one: says whether a program that was made for more samples serves a single one.
        shares: the class (`Ready`) that adopts a program finished for an equal model, if programs are shared.

    Attributes:
        recompiles: for every program after the first, why it was needed (see `Compiled`).
        latest: the program of the last call on several ranks.
        folder: where programs are kept on disk, if they are.
        named: all programs, as attributes: of a list or dict that it reads, Dynamo guards the length.
    """

    def __init__(
        self,
        extensions: tuple[Extension, ...],
        options: Options,
        finish: Callable[[Program, Tell], M],
        one: Callable[[M, Request], bool] = lambda made, request: False,
        shares: Any = None,
    ):
        self.extensions, self.options, self.finish, self.one, self.shares = extensions, options, finish, one, shares
        self.recompiles: list[str] = []
        self.named = SimpleNamespace()
        self.latest: M | None = None
        self.folder: Folder | None = None
        self._made: dict[tuple[Key, Autocast, bool], list[M]] = {}
        self._schedule = Schedule()
        self._unlent = set[Any]()  # keys for which numbers of the data cannot be tensors
        # programs for any lengths: (kind, symbolic sizes, program); by kind, what fixed lengths, "" if nothing did
        self._any_length: list[tuple[Any, Varying, M]] = []
        self._fixed_by: dict[Any, str] = {}

    def request(
        self, subject: Subject, inputs: Any, targets: tuple, mode: Autocast, create_graph: bool = False
    ) -> Request:
        """What a call with these arguments needs.

        Raises:
            ArgumentError: for arguments that no program could have.
        """
        if subject.loss is None and targets:
            raise ArgumentError("there is no loss, so nothing reads the targets: call compiled(inputs)")
        check_trainable(subject)
        arguments = flatten_arguments(inputs, targets, self.options.batch_dim, self.options.sample_index)
        n = arguments.batch_size
        for e in self.extensions:
            indices = getattr(e, "subsampling", None) or ()
            if any(i >= n for i in indices):
                raise ArgumentError(f"{e}: sample {max(indices)} of a batch of {n}, use indices below {n}")
        return Request(subject, arguments, mode, create_graph)

    def held(self, request: Request) -> M | None:
        """The program for parts of a batch, of any size, if one is made for such arguments and these Python values."""
        n, modules = max(request.arguments.batch_size, 2), request.subject.modules()
        serving = [
            made for made in self._made.get(self._key(request), []) if serves(made.program, request.arguments, n)
        ]
        return next((made for made in serving if made.program.python.holds(modules)), None)

    def spread(self, request: Request, n: int) -> M:
        """Make a program that runs on parts of a batch, captured at `n` samples on every rank."""
        new = self._lower(dataclasses.replace(request, arguments=resized(request.arguments, n)))
        refuse_observers(new.program.observed, "a call with mesh=")
        if new.program.reads is not None:
            raise CaptureError(
                f"numbers are made of values of the data ({new.program.reads.lines[0]}), which are others on every rank.\n"
                "Way out: leave them tensors, as in x.max() for x.max().item(); or call without mesh=."
            )
        self._made.setdefault(self._key(request), []).insert(0, new)
        setattr(self.named, f"program_{len(vars(self.named))}", new)
        return new

    def _key(self, request: Request) -> tuple[Key, Autocast, bool]:
        key = key_of(request.subject, request.arguments, any_size=bool(self.options.ranks))
        key = key._replace(hooks=(*key.hooks, *request.sharded))
        return key, request.mode, request.create_graph

    def find(self, request: Request, schedules: bool = True, kept: bool = False) -> M:
        """Find or make the program for these arguments and the present Python values.

        Args:
            schedules: whether Python floats may be inputs of it, and sizes beside the batch's symbolic.
            kept: whether it may be one from disk, which the first call checks.

        Raises:
            ArgumentError: for an empty batch.
        """
        if not request.arguments.batch_size:
            raise ArgumentError("the batch is empty, so there is no program: pass at least one sample")
        with compile_lock:
            return self._find(request, schedules, kept)

    def _find(self, request: Request, schedules: bool, kept: bool) -> M:
        n, modules = request.arguments.batch_size, request.subject.modules()
        key = self._key(request)
        serving = [made for made in self._made.get(key, []) if serves(made.program, request.arguments)]
        serving = [
            made for made in serving if schedules or not (made.program.python.numbers or made.program.batch.lengths)
        ]
        numbers: list[str] = []
        for made in serving:
            if made.program.python.holds(modules):
                other = numbers_differ(made.program, request)
                if not other:
                    return made
                numbers = other
        varying = self._varying_sizes(key, request) if schedules and self.options.lengths else ()
        other_kind = self._of_another_kind(key, request, varying, schedules)
        if other_kind is not None:
            self._made.setdefault(key, []).append(other_kind)
            return other_kind
        disk = self.folder if kept else None
        loaded = disk.find(request, key[0], self.extensions, self.options) if disk is not None else None
        if loaded is not None:
            self._made.setdefault(key, []).append(loaded)
            setattr(self.named, f"program_{len(vars(self.named))}", loaded)
            return loaded
        changed: list[Any] = min((made.program.python.differences(modules) for made in serving), key=len, default=[])
        known = {key: [made.program for made in some] for key, some in self._made.items()}
        found = reasons(changed) or numbers
        reason = shortened(found) if found else why(key, known, n, request.subject)
        new, why_fixed = self._make_for_lengths(key, request, varying) if any(varying) else (None, "")
        new = new or (self._make_scheduled(request, changed) if schedules and self.options.schedules else None)
        new = new or (self._make_lent(key, request) if numbers else None)
        new = new or self._lower(request)
        new.program.lengths = why_fixed or new.program.lengths
        unlike = numbers_differ(new.program, request)
        if unlike:  # from the same data, the trace and its graph compute different numbers
            raise CaptureError(
                f"{unlike[0]}: it is another number each time. Way out: compute it outside of the model."
            )
        again = f" again, because {reason}" if reason else ""
        log.info("compiled%s; batch size: %s", again, new.program.batch_note)
        self.recompiles += [reason] if reason else []
        self._made.setdefault(key, []).append(new)
        setattr(self.named, f"program_{len(vars(self.named))}", new)
        return new

    def _of_another_kind(self, key: Any, request: Request, varying: Varying, schedules: bool) -> M | None:
        """A program that serves these arguments though it was made for several samples, or for other sizes."""
        modules = request.subject.modules()

        def holds(made: M) -> bool:
            return made.program.python.holds(modules) and not numbers_differ(made.program, request)

        if key[0].single and schedules:
            for made in self._made.get((key[0]._replace(single=False), *key[1:]), []):
                if holds(made) and self.one(made, request):
                    return made
        return next(filter(holds, self._serving_lengths(key, request, varying)), None)

    def _varying_sizes(self, key: Any, request: Request) -> Varying:
        """The sizes to make symbolic: those that the user declares, and those that alone differ from a known kind's."""
        said = asked(request.arguments, self.options.dynamic_shapes)
        found = [differing(key[0], other) for other, *mode in self._made if mode == [*key[1:]]]
        known: list[Varying] = [dims for dims in found if dims is not None and any(dims)]
        return union((said, min(known, key=lambda dims: sum(len(d) for d in dims), default=said)))

    def _serving_lengths(self, key: Any, request: Request, varying: Varying) -> list[M]:
        """The programs for any lengths that serve these arguments."""
        if not varying:
            return []
        arguments, n = request.arguments, request.arguments.batch_size
        given = arguments.inputs, arguments.split_targets()
        found = []
        for (loose, *mode), dims, made in self._any_length:
            if mode == [*key[1:]] and len(dims) == len(varying) and without(key[0], dims) == loose:
                sizes = lengths_of(made.program, arguments)
                fits = made.program.fits(n, sizes, *given) and made.program.serves(max(n, 2), sizes)
                if fits and not self._why_not_one(made, request):
                    found.append(made)
        return found

    def _make_for_lengths(self, key: Any, request: Request, varying: Varying) -> tuple[M | None, str]:
        """(a new program, what fixed these sizes); the second is "" if they are symbolic.

        The program is None if these sizes are known to be fixed, or if what was captured does not serve the request.
        """
        kind = (without(key[0], varying), *key[1:])
        if kind not in self._fixed_by:
            wide = to_capture(request, varying)
            try:
                new = self._lower(wide)
                self._fixed_by[kind] = not_served(new, wide) or self._why_not_one(new, request)
                if self._fixed_by[kind] and not new.program.batch.lengths and serves(new.program, request.arguments):
                    return new, f"fixed by {self._fixed_by[kind]}"  # the captured program is the one for this length
                if not self._fixed_by[kind]:
                    self._any_length.append((kind, varying, new))
                    new.program.lengths = "symbolic (captured at " + ", ".join(map(str, new.program.batch.sizes)) + ")"
            except (FxcurvError, *FAILURES) as error:
                self._fixed_by[kind] = str(error).strip().splitlines()[0]
            if not self._fixed_by[kind]:
                return new, ""
            log.info("a program for every length: fixed by %s", self._fixed_by[kind])
        return None, f"fixed by {self._fixed_by[kind]}" if self._fixed_by[kind] else ""

    def _why_not_one(self, made: M, request: Request) -> str:
        """Why a program does not serve a request of one sample; "" if it does, or for more samples."""
        return "" if request.arguments.batch_size > 1 or self.one(made, request) else "a batch of one sample"

    def like(self, request: Request) -> M:
        """A program for batches like this empty one: an existing one, or one that is made at two samples."""
        mode = request.mode, request.create_graph
        for (key, *others), some in self._made.items():
            n = some[0].program.batch.size
            given = filled_up(request.arguments, n, [k for shape, *_ in key.targets for k in multiples(shape)])
            if (key_of(request.subject, given), *mode) == (key, *others):
                return some[0]
        return self.find(dataclasses.replace(request, arguments=filled_up(request.arguments, 2)))

    def holds(self, made: M, request: Request) -> bool:
        """Whether `find` would still return `made`, which it returned for these arguments before."""
        python = made.program.python.holds(request.subject.modules())
        return made in self._made.get(self._key(request), []) and python and not numbers_differ(made.program, request)

    def keep(self, made: Any, request: Request) -> None:
        """Write a program that has served a call to disk, if programs are kept there and this one is not yet."""
        if self.folder is not None and not made.kept:
            self.folder.keep(made, request, self._key(request)[0], self.extensions, self.options)

    def distrust(self, request: Request, wrong: bool) -> bool:
        """Forget the programs from disk that have served no call here yet, and return whether there were any.

        Args:
            wrong: whether the numbers of one were wrong.
        """
        some: list[Any] = self._made.get(self._key(request), [])
        unused = [made for made in some if getattr(made, "loaded", "") and made.size is None]
        for made in unused:
            some.remove(made)
            if self.folder is not None:
                self.folder.distrust(made, wrong)
        return bool(unused)

    def name_of(self, made: M) -> str:
        """The name of a program in `named`."""
        return next(name for name, other in vars(self.named).items() if other is made)

    def captured(self, request: Request, numbers: tuple[Path, ...] = ()) -> Program:
        """Capture, and set what was requested; `numbers`: the places of Python floats that become inputs."""
        start = time.perf_counter()
        with compile_lock, uncollected():
            program = self._trace(request, numbers)
        program.timings["capture"] = time.perf_counter() - start
        program.extensions, program.rules = self.extensions, self.options.rules
        names, program.covers = covered(request.subject, self.options.params, self.extensions)
        program.params = {name: node for name, node in program.params.items() if name in names}
        program.shapes = {name: shape for name, shape in program.shapes.items() if name in names}
        program.analysis.left_out = request.subject.left_out()
        batch_dims = tuple(request.arguments.batch_dims)
        program.options = dataclasses.replace(
            self.options, batch_dims=batch_dims, create_graph=request.create_graph, index=request.arguments.index,
            edges=request.arguments.edges, sharded=request.sharded,
        )  # fmt: skip
        return program

    def _trace(self, request: Request, numbers: tuple[Path, ...]) -> Program:
        with request.as_called():
            return capture(request.subject, request.arguments, self.options.split, numbers, request.lend)

    def _capture_and_analyse(self, request: Request, numbers: tuple[Path, ...], tell: Tell = silent) -> Program:
        tell("capture")
        return self._analyse(self.captured(request, numbers), tell)

    def _analyse(self, program: Program, tell: Tell) -> Program:
        return passes.run(program, passes.ANALYSIS, self.options.debug, tell)

    def _analyse_alone(self, program: Program, tell: Tell) -> Program:
        """Analyse a captured program whose batch is one sample, wherever the model keeps it."""
        program.options = dataclasses.replace(program.options, alone=True)
        return passes.run(program, passes.ANALYSIS, self.options.debug, tell)

    @uncollected()
    def _lower(self, request: Request, numbers: tuple[Path, ...] = ()) -> M:
        n = request.arguments.batch_size
        with progress(f"compiling {type(request.subject.model).__name__}") as tell, no_complaints():
            again = lambda: self._capture_and_analyse(request, numbers, tell)  # noqa: E731
            if self.options.sample_index is not None:
                again = lambda: self._analyse_alone(self.captured(request, numbers), tell)  # noqa: E731
            finish = lambda p: self.finish(p, tell)  # noqa: E731
            if n == 1 and self.options.sample_index is None:
                return at_numbers_if_need_be(finish, self._program_of_one(request, numbers, tell), again, n)
            if self.shares is None or self.options.sample_index is not None:
                return at_numbers_if_need_be(finish, again(), again, n)
            tell("capture")
            program = self.captured(request, numbers)
            key = graph_key(program, request.mode)
            found = find(key)
            if found is not None:
                log.info("an equal model's program serves")
                return self.shares.adopted(found, program)
            made: Any = at_numbers_if_need_be(finish, self._analyse(program, tell), again, n)
            return made.shared(key)

    def _program_of_one(self, request: Request, numbers: tuple[Path, ...], tell: Tell) -> Program:
        """The analysed program of one sample: that of two, which shows where samples are, specialised to one.

        Where the graph of two computes something else at one sample than the model does, the sample is captured alone.
        """
        tell("capture")
        try:
            two = self.captured(dataclasses.replace(request, arguments=doubled(request.arguments)), numbers)
        except FxcurvError:  # for example, targets fit only an output that is squeezed at one sample
            return self._analyse_alone(self.captured(request, numbers), tell)
        # the model, or a value read from two samples, fixed the graph: it serves these two only
        if two.fixed or two.reads is not None:
            return self._analyse_alone(self.captured(request, numbers), tell)
        try:
            one = self.captured(request, numbers)
        except FxcurvError:
            one = None  # the model cannot run on one sample: `single_sample` raises for it
        if one is not None and not forward.serves_one(two, one, request):
            return self._analyse_alone(one, tell)
        two = passes.run(two, passes.ANALYSIS, self.options.debug, tell)
        if two.fixed:  # the analysis fixed the batch size at two
            return self._analyse_alone(one or self.captured(request, numbers), tell)
        return single_sample(two)

    def _make_scheduled(self, request: Request, changed: list[Any]) -> M | None:
        """A program in which floats that have changed twice are inputs, if the model can be traced so.

        Args:
            changed: what differs from the nearest program's Python values, of `State.differences`.
        """
        numbers = self._schedule.changed(changed)
        while numbers:
            try:
                if self._schedule.new() and not self._same_forward(request, numbers):
                    raise LossError("with the float as a tensor, the model computes something else")
                made = self._lower(request, numbers)
                self._schedule.works()
                return made
            except (FxcurvError, RuntimeError, TypeError, ValueError) as error:
                given_up = ", ".join(path.title for path in self._schedule.give_up())
                log.info("%s: a program for each value, because %s", given_up, error)
            numbers = self._schedule.changed(())
        return None

    def _make_lent(self, key: Any, request: Request) -> M | None:
        """A program in which the floats that `.item()` reads from data are tensors, if the model can be traced so."""
        if key in self._unlent:
            return None
        exact, lending = self._trace(request, ()), dataclasses.replace(request, lend=True)
        try:
            lent = self._trace(lending, ())
            if _count(lent) < _count(exact) and forward.same(exact, lent, request):
                return self._lower(lending)
        except (FxcurvError, RuntimeError, TypeError, ValueError) as error:
            log.info("a program for each number of the data, because %s", error)
        self._unlent.add(key)
        return None

    def _same_forward(self, request: Request, numbers: tuple[Path, ...]) -> bool:
        """Whether the forward pass computes the same with these floats as inputs as with them as constants."""
        return forward.same(self._trace(request, ()), self._trace(request, numbers), request)


def numbers_differ(program: Program, request: Request) -> list[str]:
    """Describe the numbers that tracing read from the data and that differ for these arguments."""
    if program.reads is None:
        return []
    with request.apart():
        flat = bind(program, request.subject, request.arguments, 0, None)
        with torch.random.fork_rng(cuda_devices(flat)):  # this leaves the random state for the model's own run
            return program.reads.differences(flat)


def covered(
    model: Named, params: Choice, extensions: Iterable[Extension]
) -> tuple[list[str], dict[Extension, list[str]]]:
    """(the parameters of all quantities, those of each extension that chose its own), by name."""
    names = chosen(params, model, ArgumentError, "compile")
    own = [e for e in extensions if e.params is not None]
    return names, {e: chosen(e.params, model, ExtensionError, type(e).__name__, names) for e in own}


def at_numbers_if_need_be(emit: Callable[[Program], T], program: Program, again: Callable[[], Program], n: int) -> T:
    """`emit(program)`; if an op can be traced at fixed sizes only, that of `again()`, specialised to `n` samples."""
    try:
        return emit(program)
    except UnsupportedOpError:
        if not program.batch.symbols:
            raise
    return emit(specialise(again(), n))


def single_sample(program: Program) -> Program:
    """Specialise the program of a doubled batch to one sample."""
    try:
        return specialise(program, 1)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise ArgumentError(
            f"the model cannot run on a batch of one: {error}. Way out, for batch norm in training mode: "
            "more samples, or eval()"
        ) from error


def multiples(shape: tuple) -> list[int]:
    """k for each size in a key's shape that is k times the batch size."""
    return [s[1] for s in shape if isinstance(s, tuple)]


def filled_up(arguments: Arguments, n: int, multiples: Sequence[int] = ()) -> Arguments:
    """`n` samples of zeros in place of an empty batch; `multiples`: the positions per sample of each target."""

    def filled(tensors, dims, each):
        return [
            t if d is None else t.new_zeros(*t.shape[:d], n * next(each, 1), *t.shape[d + 1 :])
            for t, d in zip(tensors, dims, strict=True)
        ]

    inputs = filled(arguments.inputs, arguments.batch_dims, iter(()))
    targets = filled(arguments.targets, arguments.target_dims(), iter(multiples))
    return dataclasses.replace(arguments, inputs=inputs, targets=targets)


def doubled(arguments: Arguments) -> Arguments:
    """The batch of one sample, twice: export would fix a batch size of 1."""

    def twice(tensors, dims):
        return [t if d is None else torch.cat([t, t], d) for t, d in zip(tensors, dims, strict=True)]

    inputs = twice(arguments.inputs, arguments.batch_dims)
    targets = twice(arguments.targets, arguments.target_dims())
    return dataclasses.replace(arguments, inputs=inputs, targets=targets)


def resized(arguments: Arguments, n: int) -> Arguments:
    """A batch of `n` samples: the given ones, repeated; zeros if there are none."""
    have = arguments.batch_size
    index = torch.arange(n) % max(have, 1)

    def again(t: torch.Tensor, d: int) -> torch.Tensor:
        return t.index_select(d, index.to(t.device)) if have else t.new_zeros(*t.shape[:d], n, *t.shape[d + 1 :])

    return arguments.along_samples(again)


def _count(program: Program) -> int:
    """How many numbers tracing read from the data."""
    return len(program.reads.values) if program.reads is not None else 0
