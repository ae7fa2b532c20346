"""One call on the ranks of a mesh: agree on the program, check it, run it, return its results.

If one rank raises, all do. At the first call for a kind of input every rank says what it compiles, and then which collectives
its program has; where these differ, all raise with the difference. Before every call the ranks tell each other how many samples
they have and which program they take; that it went well, its last sum says (`passes.last_word`), or a message after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fxcurv.errors import ArgumentError, MixedSamplesError, RankError
from fxcurv.front.arguments import Arguments
from fxcurv.front.requests import Request, Subject
from fxcurv.ir.private import pytree
from fxcurv.ir.ranks import plain_text
from fxcurv.ir.shards import Bucket
from fxcurv.kronecker import Owner
from fxcurv.passes.recycle import functional
from fxcurv.result import Result
from fxcurv.runtime.again import latest
from fxcurv.runtime.again_on_ranks import AgainOnRanks
from fxcurv.runtime.backend import Backend
from fxcurv.runtime.bind import bind, cuda_devices, seed_tensor
from fxcurv.runtime.call import keep, refuse_values, result_of, run_error, take_memory
from fxcurv.runtime.keys import key_of
from fxcurv.runtime.programs import Programs, Ready
from fxcurv.runtime.ranks import Ranks
from fxcurv.runtime.sharded import Sharded, stand_ins

# A check takes at least this many samples: the loss may ignore all of a few, and this many cost little.
FEW = 16

# What a rank says of its program: (digest, seed, whether the caller gave the seed).
Drawn: TypeAlias = Callable[[Ready | None], Sequence[int]]


@torch.compiler.disable
def call_on_ranks(
    ranks: Ranks,
    programs: Programs[Ready],
    subject: Subject,
    backend: Backend,
    inputs: Any,
    targets: tuple,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    out: Result | None = None,
    create_graph: bool = False,
    part: bool = False,
    first: int | None = None,
    values: dict[str, Tensor] | None = None,
    prepare: bool = False,
    again: list[AgainOnRanks] | None = None,
) -> Any:
    """`Compiled.__call__` under `mesh=`.

    Args:
        again: the kinds of earlier calls, the latest first; this one is put there.
        part: the batch is one of several; `first`: the number of this rank's first sample in all of them together.
        values: in place of the model's parameters.
        prepare: make and check the program, and return it without running it.

    Raises:
        MixedSamplesError: for a part whose samples interact.
        ArgumentError: for sharded parameters with `create_graph` or another backend than "eager".
    """
    drawn = functools.partial(_drawn, seed, generator)
    plain = not (create_graph or prepare) and backend.name == "eager"
    rows, repeatable = None, again is not None and plain and out is None
    quick = next((a for a in again or () if repeatable and a.holds(inputs, targets)), None)
    if quick is not None:
        rows = ranks.together(lambda: quick, lambda a: a.says(inputs, targets, drawn(a.ready)))[1]
        if quick.agrees(rows):
            return quick.call_with(ranks, programs, inputs, targets, rows)

    def prepared() -> tuple[Request, Sharded, Ready | None, Any]:
        sharded = stack.enter_context(_sharded(ranks, subject, (inputs, targets), plain))
        request = programs.request(subject, inputs, targets, subject.autocast(), create_graph)
        request = dataclasses.replace(request, sharded=sharded.buckets)
        return request, sharded, programs.held(request), None if out is None else keep(out, create_graph, backend)

    with contextlib.ExitStack() as stack:
        if rows is None:
            (request, sharded, ready, kept), rows = ranks.together(
                prepared, lambda found: (found[0].arguments.batch_size, *drawn(found[2]), to_check(found[2]))
            )
        else:
            request, sharded, ready, kept = prepared()
        sizes = [row[0] for row in rows]
        if not sum(sizes):
            raise ArgumentError("the batch is empty on every rank: pass at least one sample to one of them")
        with request.apart(), sharded.whole(any(row[4] for row in rows)):
            made, seed = _agree_on_program(ranks, programs, request, ready, rows, drawn)
            if any(row[4] for row in rows):  # one rank made its program anew, beside others that failed: all check
                made.checked = made.verified = False
            if part and made.program.analysis.mixing:
                raise MixedSamplesError(made.program.analysis.mixing.format(asked="a quantity of several batches"))
            call = _Call(ranks, made, request, sharded, sizes, seed, first, backend)
            call.check()
            if prepare:
                return made
            call.values = values or {}
            with torch.set_grad_enabled(create_graph):
                result = call.run(kept, out)
    programs.latest = made
    new = AgainOnRanks.of(made, request, inputs, targets) if repeatable else None
    if new is not None:
        again[:] = latest(new, again)  # type: ignore[index,arg-type]
    return result


def _drawn(seed: int | Tensor | None, generator: torch.Generator | None, ready: Ready | None) -> Sequence[int]:
    """(digest of the program, seed, whether the caller gave the seed); the seed is 0 where nothing is sampled."""
    if ready is None or all(i.kind != "seed" for i in ready.program.inputs):
        return (ready.digest if ready is not None else 0), 0, 0
    return ready.digest, int(seed_tensor(seed, generator, torch.device("cpu"))), seed is not None


@contextlib.contextmanager
def _sharded(ranks: Ranks, subject: Subject, arguments: tuple, plain: bool) -> Iterator[Sharded]:
    """While it is entered, sharded parameters have stand-ins; `plain`: whether the call is one that they may have."""
    if any(isinstance(t, DTensor) for t in pytree.tree_leaves(arguments)):
        raise ArgumentError("an input or target is a DTensor: pass this rank's own samples, x.to_local()")
    with stand_ins(subject.model, ranks) as sharded:
        if sharded.params and not plain:
            raise ArgumentError(
                "fully_shard with create_graph=True, torch.compile or another backend is not supported: drop one"
            )
        yield sharded


def to_check(ready: Ready | None) -> bool:
    """Whether the next call needs the model's own parameters: to make the program, or to check it."""
    if ready is None or not ready.checked:
        return True
    options = ready.program.options
    return options.debug or options.check == "always" or ready.selfcheck is not None and not ready.verified


def _agree_on_program(
    ranks: Ranks, programs: Programs[Ready], request: Request, ready: Ready | None, rows: list[list[int]], drawn: Drawn
) -> tuple[Ready, int]:
    """(the program for this call, the seed); all ranks make the program now if one of them has none.

    Raises:
        RankError: on all ranks, if their programs differ.
        ArgumentError: on all ranks, for different seeds.
    """
    if ready is None or not all(row[1] for row in rows):
        asked, largest = what_is_asked(programs, request), max(2, *(row[0] for row in rows))
        _require_equal(ranks, asked)
        made, rows = ranks.together(lambda: named(programs.spread(request, largest), asked), lambda r: (0, *drawn(r)))
    else:
        made = ready
    if len({row[1] for row in rows}) > 1:
        _require_equal(ranks, what_is_asked(programs, request))
        _require_equal(
            ranks, {"the captured ops": made.program.spread.ops, "what travels": _describe_collectives(made)}
        )
        raise RankError(
            "ranks have different programs for this call: change attributes of the model on all ranks alike"
        )
    seeds = {row[2] for row in rows if row[3]}
    if len(seeds) > 1 or seeds and not all(row[3] for row in rows):
        raise ArgumentError("seed= is not the same on all ranks: pass one seed to all of them, or none to any")
    return made, rows[0][2]


def named(ready: Ready, asked: dict[str, list[str]]) -> Ready:
    """Set the digest that ranks compare: of what was requested, the captured ops and the collectives, in order."""
    text = "\n".join(
        [
            *ready.program.spread.ops,
            *_describe_collectives(ready),
            *(line for lines in asked.values() for line in lines),
        ]
    )
    ready.digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") + 1
    return ready


def _describe_collectives(ready: Ready) -> list[str]:
    return [f"{label}, in collective {k}" for k, bucket in enumerate(ready.program.spread.buckets) for label in bucket]


class _Call:
    """One call, by a program that all ranks have agreed on."""

    def __init__(
        self, ranks: Ranks, ready: Ready, request: Request, sharded: Sharded, sizes: list[int], seed: int, first: int | None,
        backend: Backend,
    ):  # fmt: skip
        self.sharded, self.backend = sharded, backend
        self.values: dict[str, Tensor] = {}
        self.ranks, self.ready, self.request, self.sizes, self.seed = ranks, ready, request, sizes, seed
        self.part = sum(sizes), sum(sizes[: ranks.rank]) if first is None else first
        self.program, self.subject = ready.program, request.subject

    def bound(self, arguments: Arguments, part: tuple[int, int] | None = None) -> list[Any]:
        """The program's arguments.

        part: (number of samples on all ranks, number of this rank's first one); None if this rank has the whole batch.
        """
        shards = {**self.sharded.local(), **self.values} if part is not None else None
        return bind(self.program, self.subject, arguments, self.seed, None, shards, part)

    def run(self, kept: Any, out: Result | None) -> Result:
        """Compute the result."""
        backend, flat = self.backend, self.bound(self.request.arguments, self.part)
        memory = functools.partial(take_memory, self.ready, backend, self.request.arguments, flat, kept)
        values = self._on_all_ranks(lambda: self._values(self.request.arguments, flat, memory, self.part[0]))
        result = result_of(self.ready, self.subject, backend, flat, values)
        self.program.python.run_effects(self.subject.modules())
        if out is not None:
            out._memory = None
        result._fields.update(self.sharded.results(self.program, result._fields))
        for field, table in self.program.spread.owners.items():
            for name, rank in table.items():
                owner = Owner(rank, rank == self.ranks.rank, self.ranks.name, self.subject.device())
                getattr(result, field)[name].owner = owner
        result.spread_over(
            self.sizes, functools.partial(self.ranks.whole, sizes=self.sizes), self.program.spread.places
        )
        return result

    def _on_all_ranks(self, values: Callable[[], tuple]) -> tuple:
        """What the program's graph gives; if one rank raises, all do."""
        if self.program.spread.broken is None:
            return self.ranks.together(values)[0]
        return self.ranks.told(values, self.program)

    def _values(self, arguments: Arguments, flat: list[Any], memory: Callable[[], list[Tensor]], total: int) -> tuple:
        try:
            if self.backend.name == "eager":
                return self.ranks.run(self.program.gm, lambda: [*flat, *memory()], total=total)
            return self.ranks.run(self.program.gm, lambda: flat, self._compiled)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            if self.sharded.params:  # to find the op, this rank would need the whole parameters
                raise run_error(self.program, arguments, None, error) from error
            raise run_error(self.program, arguments, flat, error) from error

    def _compiled(self, flat: list[Any]) -> tuple:
        self.ready.runner = self.ready.runner or self.backend.runner(self.program)
        return self.ready.runner(flat)

    # ---- checks ----

    def check(self) -> None:
        """Do what `check=` and `debug=` ask for: conditions on all values, comparisons on some samples of each rank."""
        ready, options = self.ready, self.program.options
        if not ready.checked or options.debug:
            self._check_conditions()
        wanted = ready.selfcheck is not None and (not ready.verified or options.check == "always")
        if wanted or ready.probe is not None and not ready.checked:
            self._check_numbers(wanted)
        ready.checked, ready.verified = True, ready.verified or wanted

    def _check_conditions(self) -> None:
        module = self.program.check_module
        if module is None:
            return
        flat = self.bound(self.request.arguments, self.part)

        def held() -> None:
            with torch.random.fork_rng(cuda_devices(flat)):
                refuse_values(self.program, self.ranks.run(module, lambda: flat))

        self.ranks.together(held)

    def _check_numbers(self, compare: bool) -> None:
        """Check placements, and numbers if `compare`, on samples of all ranks, which each gathers (see `shares`)."""
        sizes = shares(self.sizes)
        mine = first_samples(self.request.arguments, sizes[self.ranks.rank])
        whole = self._gather_samples(mine, sizes)
        request, flat = dataclasses.replace(self.request, arguments=whole), self.bound(whole)
        memory, part = (
            functools.partial(self.ready.pool.take, sizes[self.ranks.rank]),
            self.bound(mine, (sum(sizes), sum(sizes[: self.ranks.rank]))),
        )
        with torch.random.fork_rng(cuda_devices(flat)):
            values, _ = self.ranks.together(lambda: self._values(mine, part, memory, sum(sizes)))
        loss, leaves, mutations, results, extras = self.program.unpack(values, lambda t: t)
        results = self.sharded.results(self.program, results)
        places, together = self.program.spread.places, functools.partial(self.ranks.whole, sizes=sizes)
        leaves = together(leaves, places["output"])
        results, extras = (
            {field: together(fields[field], known) for field, known in places[kind].items()}
            for kind, fields in (("results", results), ("extras", extras))
        )
        unpacked = loss, leaves, mutations, self.sharded.compared(self.program, results), extras

        def here() -> None:
            with torch.random.fork_rng(cuda_devices(flat)):
                if self.ready.probe is not None and not self.ready.checked:
                    self.ready.probe.run(flat, whole.batch_size)
                if compare and self.ready.selfcheck is not None:
                    check = self.ready.selfcheck.begin(self.program, request, flat)
                    alone = self.ready.selfcheck.random  # ranks draw other numbers than one process with all samples
                    check.compare(
                        self.program.unpack(functional(self.program)(*flat), lambda t: t) if alone else unpacked
                    )

        self.ranks.together(here)

    def _gather_samples(self, arguments: Arguments, sizes: Sequence[int]) -> Arguments:
        """Gather the samples of all ranks."""

        def rows(t: Tensor, d: int) -> Tensor:
            return self.ranks.rows(t.detach().movedim(d, 0).contiguous(), sizes).movedim(0, d)

        return arguments.along_samples(rows)


def shares(sizes: Sequence[int]) -> list[int]:
    """How many samples each rank gives to a check: evenly, and in total as many as the largest has, at least `FEW`."""
    out, left = [0] * len(sizes), min(max(FEW, *sizes), sum(sizes))
    while left:
        for k, n in enumerate(sizes):
            if left and out[k] < n:
                out[k] += 1
                left -= 1
    return out


def first_samples(arguments: Arguments, n: int) -> Arguments:
    """The first `n` samples."""
    return arguments.along_samples(lambda t, d: t.narrow(d, 0, n)) if n != arguments.batch_size else arguments


# ---- agreement ------------------------------


def what_is_asked(programs: Programs[Ready], request: Request) -> dict[str, list[str]]:
    """What determines a program, in words that are the same in every process."""
    key = key_of(request.subject, request.arguments, any_size=True)
    options = dataclasses.asdict(dataclasses.replace(programs.options, rules={}, rank=0))
    return {
        "the extensions": [plain_text(str(e)) for e in programs.extensions],
        "the options": [plain_text(f"{name}={value!r}") for name, value in options.items()],
        "the modules": [f"{kind.__qualname__} in {'training' if on else 'eval'} mode" for kind, on in key.modules],
        "the parameters": [
            f"{name} {tuple(shape)} {dtype} requires_grad={on}" for name, on, dtype, _, shape in key.tensors
        ],
        "the sharded parameters": [_describe_bucket(bucket) for bucket in request.sharded],
        "the inputs": [f"{shape} {dtype}" for shape, dtype, _ in key.inputs],
        "the targets": [f"{shape} {dtype}" for shape, dtype, _ in key.targets],
        "autocast": [str(request.mode.dtype)],
    }


def _describe_bucket(bucket: Bucket) -> str:
    """How a bucket is gathered, without what differs between ranks."""
    between = bucket.between and bucket.between[1]
    return (
        f"{', '.join(bucket.names)}: {bucket.dtypes}, gathered again: {bucket.again}, held by {between} ranks between"
    )


def _require_equal(ranks: Ranks, mine: dict[str, list[str]]) -> None:
    """Raise on all ranks if `mine` is not the same on all of them."""
    found = ranks.objects(mine)
    for rank, other in enumerate(found):
        for what, here in found[0].items():
            for a, b in zip(_padded(here, other[what]), _padded(other[what], here), strict=True):
                if a != b:
                    raise RankError(
                        f"ranks compile different programs: of {what}, rank 0 has {a}, and rank {rank} has {b}. Way out: the "
                        "same model, loss, extensions and kinds of arguments on every rank of the mesh; only the number of "
                        "samples may differ."
                    )


def _padded(some: list[str], others: list[str]) -> list[str]:
    return [*some, *["nothing"] * (len(others) - len(some))]
