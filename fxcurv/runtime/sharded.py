"""Models of `fully_shard` (FSDP2): the graph gathers parameters where it uses them, and results are sharded like them.

During a call the module holds stand-ins for its `DTensor`s: tensors of the parameters' shapes without memory, which
suffice to find a program. They hold the whole parameters only where a program is made or checked, at its first call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import map_leaves
from fxcurv.ir.private import (
    own_forward_hooks,
    own_parameters,
    precision_of_fsdp,
    reshards_after_forward,
    reshards_to,
)
from fxcurv.ir.program import Program
from fxcurv.ir.shards import Bucket, Cut, Dtypes
from fxcurv.runtime.ranks import Ranks


class Sharded:
    """The sharded parameters of a model, for one call.

    Attributes:
        params: name -> the `DTensor`; `buckets`: how graphs gather them; `dtypes`: name -> dtypes of mixed precision.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.params = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        _check(self.params, ranks)
        self.buckets = tuple(_buckets(model, self.params, ranks))
        others = set(self.params) - {name for bucket in self.buckets for name in bucket.names}
        if others:
            raise ArgumentError(
                f"parameter '{min(others)}' is a DTensor that fully_shard has not made (tensor parallelism), which is not "
                "supported with mesh=. Way out: fully_shard in its place"
            )
        self.dtypes = {name: bucket.dtypes for bucket in self.buckets for name in bucket.names}
        self._stand_ins = {name: _without_memory(p, self.dtypes[name].computed) for name, p in self.params.items()}

    def local(self) -> dict[str, Tensor]:
        """This rank's shards, by name."""
        return {name: p.to_local().detach() for name, p in self.params.items()}

    @contextlib.contextmanager
    def whole(self, wanted: bool) -> Iterator[None]:
        """Let the stand-ins hold the whole parameters, if `wanted`, which must be the same on all ranks."""
        if not wanted:
            yield
            return
        try:
            for name, p in self.params.items():
                stand = self._stand_ins[name].detach()
                stand.untyped_storage().resize_(stand.numel() * stand.element_size())
                stand.copy_(p.full_tensor().detach())
            yield
        finally:
            for stand in self._stand_ins.values():
                stand.untyped_storage().resize_(0)

    def results(self, program: Program, fields: dict[str, Any]) -> dict[str, Any]:
        """Results with the mesh, placements and dtype of their parameters, where they have the parameter's shape."""
        known = {field: fields[field] for field in program.spread.summed if isinstance(fields.get(field), dict)}
        return {
            **fields,
            **{f: {n: self._place(program, f, n, v) for n, v in table.items()} for f, table in known.items()},
        }

    def compared(self, program: Program, fields: dict[str, Any]) -> dict[str, Any]:
        """Whole results in the coarsest dtype that they were rounded to, so that a comparison allows for it."""
        out = dict(fields)
        for field in program.spread.summed.intersection(fields):
            if isinstance(table := fields[field], dict):
                out[field] = {name: self._to_coarsest(name, value) for name, value in table.items()}
        return out

    def _to_coarsest(self, name: str, value: Any) -> Any:
        p, dtypes = self.params.get(name), self.dtypes.get(name)
        if dtypes is None or not dtypes.mixed or not isinstance(value, Tensor) or value.shape != p.shape:  # type: ignore[union-attr]
            return value
        return value.to(dtypes.coarsest)

    def _place(self, program: Program, field: str, name: str, value: Any) -> Any:
        p = self.params.get(name)
        if p is None or not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        if value.shape == p.shape:
            value = value.to(self.dtypes[name].result(value.dtype))
        if (field, name) in program.spread.shards:
            stride = torch.empty(p.shape, device="meta").stride()
            return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=stride)
        return like(value, p) if value.shape == p.shape else value


@contextlib.contextmanager
def stand_ins(model: nn.Module, ranks: Ranks) -> Iterator[Sharded]:
    """Put plain tensors without memory in place of sharded parameters, and casts in place of FSDP's forward hooks.

    Raises:
        ArgumentError: for parameters on another mesh, or cut in another way.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    sharded = Sharded(model, ranks)
    if not sharded.params:
        yield sharded
        return
    stands = {id(p): sharded._stand_ins[name] for name, p in sharded.params.items()}
    undo: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            tables: list[Any] = [own_parameters(module), *own_forward_hooks(module)]
            for table in tables:
                undo.append((table, table.copy()))
            for name, p in list(own_parameters(module).items()):
                if id(p) in stands:
                    own_parameters(module)[name] = stands[id(p)]
            for hooks, cast in zip(own_forward_hooks(module), _casts(module), strict=True):
                for key in [k for k, hook in hooks.items() if _is_fsdp_hook(hook)]:
                    if cast is None:
                        del hooks[key]
                    else:
                        hooks[key] = cast
        yield sharded
    finally:
        for table, old in undo:
            table.clear()
            table.update(old)


def _without_memory(p: DTensor, dtype: torch.dtype) -> nn.Parameter:
    t = torch.empty(p.shape, dtype=dtype, device=p.device)
    t.untyped_storage().resize_(0)
    return nn.Parameter(t, p.requires_grad)


def _buckets(model: nn.Module, params: dict[str, DTensor], ranks: Ranks) -> Iterator[Bucket]:
    """The parameters of each module that `fully_shard` was called with, without those of such modules inside it.

    A bucket has parameters of one dtype, mesh and placement.
    """
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
            between = reshards_to(module)
            yield Bucket(
                tuple(names[id(p)] for p in alike),
                tuple(_cut(p, dim) for p in alike),
                group.group_name,
                others[0].group_name if others else "",
                _dtypes(alike[0], precision_of_fsdp(module)),
                reshards_after_forward(module, id(module) not in inside),
                (_noted(between, ranks).group_name, between.size(), between.rank()) if between is not None else None,
            )


def _dtypes(p: Tensor, policy: Any) -> Dtypes:
    """The dtypes of a parameter, by the mixed precision policy of its module."""
    if not p.is_floating_point():
        return Dtypes(p.dtype, p.dtype)
    return Dtypes(p.dtype, policy.param_dtype or p.dtype, policy.reduce_dtype)


def _group(p: DTensor, dim: int, ranks: Ranks) -> Any:
    return _noted(p.device_mesh.get_group(dim), ranks)


def _noted(group: Any, ranks: Ranks) -> Any:
    """Note a group in `ranks.others`, since graphs have collectives over it, and return it."""
    if group.group_name not in {g.group_name for g in ranks.others}:
        ranks.others.append(group)
    return group


def _cut(p: DTensor, dim: int) -> Cut:
    place: Any = p.placements[dim]
    return Cut(tuple(p.shape), place.dim, p.device_mesh.size(dim), p.device_mesh.get_local_rank(dim))


def _casts(module: nn.Module) -> tuple[Callable | None, Callable | None]:
    """The casts before and after a module's forward pass, by its mixed precision policy, in place of FSDP's hooks."""
    if not isinstance(module, FSDPModule):
        return None, None
    policy = precision_of_fsdp(module)
    before = functools.partial(_cast_inputs, policy.param_dtype) if policy.cast_forward_inputs else None
    after = functools.partial(_cast_output, policy.output_dtype)
    return before if policy.param_dtype else None, after if policy.output_dtype else None


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return _cast(args, dtype), _cast(kwargs, dtype)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return map_leaves(values, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _is_fsdp_hook(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return (type(owner) if owner is not None else hook).__module__.startswith("torch.distributed.fsdp")


def _check(sharded: dict[str, DTensor], ranks: Ranks) -> None:
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


def whole(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, gathered from their shards: all ranks must call this."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in named.items()}


def like(value: Tensor, p: Tensor) -> Tensor:
    """A value that all ranks hold, placed as `p` is: this rank's shard of it, if `p` is sharded."""
    if not isinstance(p, DTensor) or isinstance(value, DTensor):
        return value
    whole = DTensor.from_local(value, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    local = whole.redistribute(placements=p.placements).to_local().clone()  # memory of its own: the rest is freed
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=value.shape, stride=value.contiguous().stride()
    )
