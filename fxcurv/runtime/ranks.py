"""The processes of a device mesh, each of which has a part of the batch, and what they tell each other around a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fxcurv.errors import ArgumentError, ExtensionError, RankError
from fxcurv.extensions import Extension
from fxcurv.ir.placement import Placement, Shard, samples_back, samples_first
from fxcurv.ir.private import collectives_of, flattened_mesh, pytree
from fxcurv.ir.program import Program
from fxcurv.ir.shards import OnItsWay
from fxcurv.passes.distribute import rest

T = TypeVar("T")


class Ranks:
    """A process group whose ranks have a part of the batch each, in the order of their numbers.

    Attributes:
        name: the group's name, by which collectives in a graph refer to it.
        others: groups of some of its ranks, over which graphs have collectives too.
    """

    def __init__(self, mesh: Any):
        if not isinstance(mesh, DeviceMesh):
            raise ArgumentError(
                f"mesh= is a {type(mesh).__name__}: pass a DeviceMesh, of torch.distributed.device_mesh.init_device_mesh"
            )
        if mesh.get_coordinate() is None:
            raise ArgumentError("this process is no part of mesh=: compile only where the mesh has a rank")
        self.group = (mesh if mesh.ndim == 1 else flattened_mesh(mesh)).get_group()
        self.name, self.rank, self.size = (
            self.group.group_name,
            dist.get_rank(self.group),
            dist.get_world_size(self.group),
        )
        self._device = torch.device(mesh.device_type)
        self.others: list[Any] = []  # groups of some of the ranks, which shards are gathered over
        self._owed = False  # whether this rank broke off before the last collective of a program
        self._late: Exception | None = None  # raised behind it, of which the others do not know

    # ---- messages ----

    def numbers(self, mine: Sequence[int]) -> list[list[int]]:
        """Gather the numbers of every rank, a row for each."""
        row = torch.tensor(mine, dtype=torch.long, device=self._device)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row, self.group)
        return torch.stack(rows).tolist()

    def objects(self, mine: T) -> list[T]:
        """Gather an object of every rank, which can be pickled."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, self.group)
        return found

    def together(
        self, fn: Callable[[], T], say: Callable[[T], Sequence[int]] = lambda value: ()
    ) -> tuple[T, list[list[int]]]:
        """Run `fn` on every rank: (its value here, the numbers that `say` gives for it on every rank).

        `fn` may talk to other ranks only by `run`.

        Raises:
            RankError: if `fn` raised on another rank; that rank raises the error itself.
        """
        error: Exception | None = None
        value: Any = None
        try:
            if self._late is not None:
                raise RankError(f"the call before failed on this rank alone, at its end: {self._late}") from self._late
            value = fn()
            said = [1, *say(value)]
        except Exception as raised:  # whatever it is, the others wait
            error, said = raised, [0]
        rows = self.numbers([*said, *[0] * (_WIDTH - len(said))])
        if not all(row[0] for row in rows):
            self._raise(error)
        return value, [row[1:] for row in rows]

    def told(self, fn: Callable[[], tuple], program: Program) -> tuple:
        """`together`, for a program of which the last sum says whether all ranks got there (`passes.last_word`).

        What this rank raises behind that sum, the others hear of at the next call: they have right results of this one.

        Args:
            fn: gives what `run` gives for the program.
        """
        where = program.output.args[0].index(program.spread.broken)  # type: ignore[union-attr,arg-type]
        self._owed = True
        try:
            value = fn()
        except Exception as error:
            if self._owed:
                self._raise(error)
            self._late = error
            raise
        if value[where]:
            self._raise(None)
        return value

    def _raise(self, error: Exception | None) -> NoReturn:
        self._late = None
        texts = self.objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        rank = next(k for k, text in enumerate(texts) if text is not None)
        raise RankError(f"rank {rank} of the mesh raised, so no rank has a result. There it is\n{texts[rank]}")

    # ---- values ----

    def run(
        self,
        gm: fx.GraphModule,
        arguments: Callable[[], Sequence[Any]],
        compiled: Callable[[list[Any]], tuple] | None = None,
        total: int = 0,
    ) -> tuple:
        """Run a graph with collectives; if it fails here, the ones that others wait for are still done.

        Args:
            compiled: runs in place of the graph, with the same collectives in the same order.
            total: the number of samples of all ranks.
        """
        before, self._owed = self._count_begun(), False
        try:
            return gm(*arguments()) if compiled is None else compiled(list(arguments()))
        except Exception:
            for collective in rest(gm, self._count_begun() - before, total):
                self._owed, begun = True, collective()
                if isinstance(begun, OnItsWay):
                    begun.wait()
                elif isinstance(begun, Tensor):
                    torch.ops._c10d_functional.wait_tensor(begun)
            raise

    def _count_begun(self) -> int:
        """How many collectives this rank has begun, in all groups that its programs use."""
        return sum(map(collectives_of, {g.group_name: g for g in (self.group, *self.others)}.values()))

    def rows(self, t: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the rows of all ranks; `t`: those of this one."""
        if t.dtype == torch.bool:  # which gloo does not gather
            return self.rows(t.view(torch.uint8), sizes).view(torch.bool)
        padded = t.new_zeros(max(sizes), *t.shape[1:])
        padded[: t.shape[0]] = t
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, self.group)
        return torch.cat([part[:n] for part, n in zip(found, sizes, strict=True)])

    def whole(self, values: Any, places: Any, sizes: Sequence[int]) -> Any:
        """Gather a pytree of values, each to the whole batch; `places`: their placements."""
        leaves, spec = pytree.tree_flatten(values)
        return pytree.tree_unflatten(
            [self._gather(v, p, sizes) for v, p in zip(leaves, pytree.tree_leaves(places), strict=True)], spec
        )

    def _gather(self, value: Any, place: Placement, sizes: Sequence[int]) -> Any:
        if isinstance(value, DTensor):
            return value.full_tensor()
        if not isinstance(value, Tensor) or not isinstance(place, Shard):
            return value
        return samples_back(self.rows(samples_first(value.detach(), place).contiguous(), sizes), place)


NUMBERS = 4  # how many numbers of the data a message may have
_WIDTH = 7 + NUMBERS


# ---- what compile() is given ------------------------------


def ranks_of(mesh: Any, model: nn.Module, extensions: Sequence[Extension], backend: Any) -> Ranks | None:
    """The ranks of `mesh=`, None without one.

    Raises:
        ArgumentError: if `mesh` is not one, or has other ranks than the model's wrapper; for FSDP1; for a sharded or
            wrapped model without a mesh; for other backends than "eager" with factors at one rank each, or with pairs
            of samples.
        ExtensionError: for `subsampling=`.
    """
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ArgumentError(
            "the model is a FullyShardedDataParallel (FSDP1), which is not supported: use fully_shard, and mesh="
        )
    if mesh is None:
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ArgumentError("the parameters are DTensors: pass mesh=, for quantities of the batch of all ranks")
        if isinstance(model, DistributedDataParallel):
            raise ArgumentError(
                "the model is a DistributedDataParallel: pass mesh=, for quantities of the batch of all ranks, or model.module, "
                "for those of this rank's own"
            )
        return None
    ranks = Ranks(mesh)
    if isinstance(model, DistributedDataParallel):
        theirs = dist.get_process_group_ranks(model.process_group)
        if theirs != dist.get_process_group_ranks(ranks.group):
            raise ArgumentError(
                f"the model is a DistributedDataParallel on ranks {theirs}, and mesh= is on others: use one mesh"
            )
    if backend != "eager" and any(getattr(e, "assign", "all") == "layers" for e in extensions):
        raise ArgumentError(
            f"mesh= with assign='layers' and backend={backend!r} is not supported: use 'eager', or assign='all'"
        )
    for e in extensions if backend != "eager" else ():
        if e.pairs:
            raise ArgumentError(f"mesh= with {type(e).__name__} and backend={backend!r} is not supported: use 'eager'")
    no_numbers(extensions)
    return ranks


def no_numbers(extensions: Sequence[Extension]) -> None:
    """Refuse extensions that choose samples by their numbers.

    Raises:
        ExtensionError: for `subsampling=`.
    """
    for e in extensions:
        if getattr(e, "subsampling", None) is not None:
            raise ExtensionError(f"{e} with mesh=: ranks have different samples. Way out: index the result instead")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a `DistributedDataParallel`, whose gradients are not to be averaged again."""
    return model.module if isinstance(model, DistributedDataParallel) else model
