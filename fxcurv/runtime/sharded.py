"""Models of `fully_shard` (FSDP2): the graph gathers parameters where it uses them, results are sharded as the parameters are.

For a call the module holds tensors of the parameters' shapes without memory in place of its `DTensor`s, which say all that a
program is found by. Only where a program is made or checked, at its first call, do they hold the whole parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from fxcurv.errors import ArgumentError
from fxcurv.ir.private import (
    own_forward_hooks,
    own_parameters,
    precision_of_fsdp,
    reshards_after_forward,
    reshards_to_some,
)
from fxcurv.ir.program import Program
from fxcurv.ir.shards import Bucket, Cut
from fxcurv.runtime.ranks import Ranks


class Sharded:
    """The parameters of a model that are sharded, for one call.

    Attributes:
        params: name -> the `DTensor`; `buckets`: how graphs gather them.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.params = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        _check(model, self.params, ranks)
        self.buckets = tuple(_buckets(model, self.params, ranks))
        others = set(self.params) - {name for bucket in self.buckets for name in bucket.names}
        if others:
            raise ArgumentError(
                f"parameter '{min(others)}' is a DTensor that fully_shard has not made (tensor parallelism), which is not "
                "supported with mesh=. Way out: fully_shard in its place"
            )
        self._stands = {name: _without_memory(p) for name, p in self.params.items()}

    def local(self) -> dict[str, Tensor]:
        """This rank's shards, by name."""
        return {name: p.to_local().detach() for name, p in self.params.items()}

    @contextlib.contextmanager
    def whole(self, wanted: bool) -> Iterator[None]:
        """With the whole parameters, if `wanted`: all ranks have to ask for it."""
        if not wanted:
            yield
            return
        try:
            for name, p in self.params.items():
                stand = self._stands[name].detach()
                stand.untyped_storage().resize_(stand.numel() * stand.element_size())
                stand.copy_(p.full_tensor().detach())
            yield
        finally:
            for stand in self._stands.values():
                stand.untyped_storage().resize_(0)

    def results(self, program: Program, fields: dict[str, Any]) -> dict[str, Any]:
        """Results with the mesh and placements of their parameters, where they have the parameter's shape."""
        known = {field: fields[field] for field in program.spread.summed if isinstance(fields.get(field), dict)}
        return {
            **fields,
            **{f: {n: self._placed(program, f, n, v) for n, v in table.items()} for f, table in known.items()},
        }

    def _placed(self, program: Program, field: str, name: str, value: Any) -> Any:
        p = self.params.get(name)
        if p is None or not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        if (field, name) in program.spread.shards:
            stride = torch.empty(p.shape, device="meta").stride()
            return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=stride)
        return like(value, p) if value.shape == p.shape else value


@contextlib.contextmanager
def stand_ins(model: nn.Module, ranks: Ranks) -> Iterator[Sharded]:
    """With plain tensors without memory for the parameters that are sharded, and without what FSDP does around a forward pass.

    Raises:
        ArgumentError: for parameters on another mesh, or cut in another way, a mixed precision policy that is of other dtypes
            than they are, and parameters that are cut in another way between the passes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    sharded = Sharded(model, ranks)
    if not sharded.params:
        yield sharded
        return
    stands = {id(p): sharded._stands[name] for name, p in sharded.params.items()}
    undo: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            tables: list[Any] = [own_parameters(module), *own_forward_hooks(module)]
            for table in tables:
                undo.append((table, table.copy()))
            for name, p in list(own_parameters(module).items()):
                if id(p) in stands:
                    own_parameters(module)[name] = stands[id(p)]
            for hooks in own_forward_hooks(module):
                for key in [k for k, hook in hooks.items() if _of_fsdp(hook)]:
                    del hooks[key]
        yield sharded
    finally:
        for table, old in undo:
            table.clear()
            table.update(old)


def _without_memory(p: DTensor) -> nn.Parameter:
    t = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    t.untyped_storage().resize_(0)
    return nn.Parameter(t, p.requires_grad)


def _buckets(model: nn.Module, params: dict[str, DTensor], ranks: Ranks) -> Iterator[Bucket]:
    """The parameters of each module that `fully_shard` was called with, but for those of such a module inside it."""
    names = {id(p): name for name, p in params.items()}
    left = dict(names)
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    inside = {id(m) for outer in modules for m in outer.modules() if m is not outer}
    for module in reversed(modules):  # inner ones first
        own = [p for p in module.parameters() if left.pop(id(p), None) is not None]
        for kind in dict.fromkeys((p.dtype, p.device_mesh, p.placements) for p in own):
            alike = [p for p in own if (p.dtype, p.device_mesh, p.placements) == kind]
            dim = next(k for k, place in enumerate(alike[0].placements) if isinstance(place, Shard))
            group = _group(alike[0], dim, ranks)
            others = [_group(alike[0], k, ranks) for k in range(alike[0].device_mesh.ndim) if k != dim]
            yield Bucket(
                tuple(names[id(p)] for p in alike),
                tuple(_cut(p, dim) for p in alike),
                group.group_name,
                others[0].group_name if others else "",
                reshards_after_forward(module, id(module) not in inside),
            )


def _group(p: DTensor, dim: int, ranks: Ranks) -> Any:
    group = p.device_mesh.get_group(dim)
    if group.group_name not in {g.group_name for g in ranks.others}:
        ranks.others.append(group)
    return group


def _cut(p: DTensor, dim: int) -> Cut:
    place: Any = p.placements[dim]
    return Cut(tuple(p.shape), place.dim, p.device_mesh.size(dim), p.device_mesh.get_local_rank(dim))


def _of_fsdp(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return (type(owner) if owner is not None else hook).__module__.startswith("torch.distributed.fsdp")


def _check(model: nn.Module, sharded: dict[str, DTensor], ranks: Ranks) -> None:
    ours = sorted(dist.get_process_group_ranks(ranks.group))
    meshes = {p.device_mesh for p in sharded.values()}
    if len(meshes) > 1:
        raise ArgumentError(
            f"the parameters are DTensors on several meshes, {' and '.join(str(m) for m in meshes)}. Way out: fully_shard all of "
            "the model on the mesh that compile() gets"
        )
    for name, p in sharded.items():
        theirs = sorted(p.device_mesh.mesh.flatten().tolist())
        if theirs != ours:
            raise ArgumentError(
                f"parameter '{name}' is a DTensor on ranks {theirs}, and mesh= is of ranks {ours}. Way out: fully_shard on the "
                "mesh that compile() gets; layers whose parameters are on other meshes (tensor parallel) are not supported"
            )
        if sorted(type(x).__name__ for x in p.placements) not in (["Shard"], ["Replicate", "Shard"]):
            raise ArgumentError(
                f"parameter '{name}' is placed {list(p.placements)}, and mesh= takes what fully_shard has cut along one "
                "dimension. Way out: fully_shard alone; layers that are cut for tensor parallelism are not supported"
            )
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            _check_wrapped(name, module)


def _check_wrapped(name: str, module: FSDPModule) -> None:
    """Refuse what a `fully_shard` asks for and graphs do not do."""
    of = f"fully_shard of '{name}'" if name else "fully_shard of the model"
    policy = precision_of_fsdp(module)
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}  # type: ignore[attr-defined]
    asked = {field: getattr(policy, field) for field in ("param_dtype", "reduce_dtype", "output_dtype")}
    others = [f"{field}={dtype}" for field, dtype in asked.items() if dtype is not None and dtypes - {dtype}]
    if others:
        raise ArgumentError(
            f"{of} has a mixed precision policy, {', '.join(others)} for parameters of {' and '.join(map(str, dtypes))}, which "
            "is not supported with mesh=. Way out: torch.autocast around the call, or parameters of that dtype"
        )
    if reshards_to_some(module):
        raise ArgumentError(
            f"{of} has reshard_after_forward=<number of ranks>, which is not supported with mesh=. Way out: True or False"
        )


def whole(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are not cut: all ranks call this."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in named.items()}


def like(value: Tensor, p: Tensor) -> Tensor:
    """A value that all ranks have as `p` is: of a sharded one this rank's shard."""
    if not isinstance(p, DTensor) or isinstance(value, DTensor):
        return value
    whole = DTensor.from_local(value, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    local = whole.redistribute(placements=p.placements).to_local().clone()  # memory of its own: the rest goes
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=value.shape, stride=value.contiguous().stride()
    )
