"""Models of `fully_shard` (FSDP2): whole parameters for a call, results sharded as the parameters are.

All parameters are gathered before a call and dropped after it, and each [*P] result is added up on all ranks before every
rank keeps its shard (an all-reduce in place of a reduce-scatter): the peak holds the model's parameters and results once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from fxcurv.errors import ArgumentError
from fxcurv.ir.private import own_forward_hooks, own_parameters, precision_of_fsdp
from fxcurv.result import Result
from fxcurv.runtime.ranks import Ranks


@contextlib.contextmanager
def whole_parameters(model: nn.Module, ranks: Ranks) -> Iterator[dict[str, DTensor]]:
    """With plain tensors for the parameters that are sharded, and without what FSDP does around a forward pass.

    Yields the sharded ones by name.

    Raises:
        ArgumentError: for parameters on another mesh, and a mixed precision policy.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    if not sharded:
        yield {}
        return
    _check(model, sharded, ranks)
    whole = {id(p): nn.Parameter(p.full_tensor().detach(), p.requires_grad) for p in sharded.values()}
    undo: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            tables: list[Any] = [own_parameters(module), *own_forward_hooks(module)]
            for table in tables:
                undo.append((table, table.copy()))
            for name, p in list(own_parameters(module).items()):
                if id(p) in whole:
                    own_parameters(module)[name] = whole[id(p)]
            for hooks in own_forward_hooks(module):
                for key in [k for k, hook in hooks.items() if _of_fsdp(hook)]:
                    del hooks[key]
        yield sharded
    finally:
        for table, old in undo:
            table.clear()
            table.update(old)


def _of_fsdp(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return (type(owner) if owner is not None else hook).__module__.startswith("torch.distributed.fsdp")


def _check(model: nn.Module, sharded: dict[str, DTensor], ranks: Ranks) -> None:
    ours = sorted(dist.get_process_group_ranks(ranks.group))
    for name, p in sharded.items():
        theirs = sorted(p.device_mesh.mesh.flatten().tolist())
        if theirs != ours:
            raise ArgumentError(
                f"parameter '{name}' is a DTensor on ranks {theirs}, and mesh= is of ranks {ours}. Way out: fully_shard on the "
                "mesh that compile() gets; layers whose parameters are on other meshes (tensor parallel) are not supported"
            )
    policies = {precision_of_fsdp(m) for m in model.modules() if isinstance(m, FSDPModule)}
    if any(p.param_dtype or p.output_dtype for p in policies):
        raise ArgumentError(
            "fully_shard has a mixed precision policy, which is not supported with mesh=. Way out: torch.autocast around the "
            "call, or parameters of that dtype"
        )


def shard_results(result: Result, sharded: dict[str, DTensor]) -> None:
    """Give every [*P] result the mesh and placements of its parameter."""
    summed = ["grad", *(e.savefield for e in result.extensions if e.sample_axis is None)]
    for field in [f for f in summed if isinstance(getattr(result, f, None), dict)]:
        values = getattr(result, field)
        for name, value in values.items():
            p = sharded.get(name)
            if p is not None and isinstance(value, Tensor) and value.shape == p.shape:
                values[name] = _like(value, p)


def _like(value: Tensor, p: DTensor) -> DTensor:
    """This rank's shard of a value that all ranks have."""
    whole = DTensor.from_local(value, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    local = whole.redistribute(placements=p.placements).to_local().clone()  # memory of its own: the rest goes
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=value.shape, stride=value.contiguous().stride()
    )
