"""Every extension x {no wrapper, DDP, FSDP2, HSDP} x models, on 2 and on 4 ranks, against one process on the whole batch.

The processes are started once for each number of ranks and go through all cells; a program has all extensions of its model.
"""

from __future__ import annotations

import dataclasses
import traceback

import pytest
import torch
from asked import arrays
from processes import on_ranks
from subjects import compare, made, mesh_of, part
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fxcurv
from fxcurv.errors import MixedSamplesError
from fxcurv.extensions import (
    GGNMP,
    HMP,
    KFLR,
    KFRA,
    NTK,
    BatchDiagHessian,
    DiagHessian,
    Dots,
    Extension,
    GramGGN,
    GramGrad,
    Projected,
    Quadratic,
)
from fxcurv.kronecker import Blocks

WRAPPERS = ("plain", "ddp", "fsdp", "hsdp")
MODELS = ("mlp", "cnn", "transformer", "batch_norm")
CUTS = {2: [[5, 2], [0, 7], [6, 1]], 4: [[3, 0, 2, 2], [1, 1, 1, 4], [0, 0, 0, 7]]}
PRODUCTS = (GGNMP(), HMP())
# What is refused on several ranks: KFRA across max-pooling, Hessians of what is traced at numbers for sizes.
# Across batch norm in training mode samples interact, so the gradient (and new statistics) are all there is.
REFUSED: dict[str, tuple[type[Extension], ...]] = {
    "mlp": (),
    "cnn": (KFRA,),
    "transformer": (DiagHessian, BatchDiagHessian),
    "batch_norm": (),
}


def asked_of(name: str) -> list[Extension]:
    """What a model is asked for."""
    if name == "batch_norm":
        return []
    model, loss, x, y = made(name, 7)
    torch.manual_seed(1)
    vectors = {n: torch.randn(2, *p.shape, dtype=p.dtype) for n, p in model.named_parameters()}
    without = (*REFUSED[name], *((KFRA,) if name == "transformer" else ()))  # which no process has there
    found = [e for e in arrays(max_norm=0.05, mc_samples=2) if not isinstance(e, without)]
    found = [dataclasses.replace(e, joint=True) if name == "cnn" and isinstance(e, KFLR) else e for e in found]
    more = [Dots(vectors), Projected(3), NTK(), GramGrad(), GramGGN()]
    if name == "mlp":
        factors = fxcurv.compile(model, loss, [KFLR()], check=None)(x, y).kflr
        more += [Quadratic(Blocks(factors).inverse(0.1)), *PRODUCTS]
    return [*found, *more]


def expected(name: str, asked: list[Extension]) -> fxcurv.Result:
    """What one process has on the whole batch; `products`: of matrices with the columns of `probes`."""
    model, loss, x, y = made(name, 7)
    result = fxcurv.compile(model, loss, asked, check=None, update_buffers=False)(x, y, seed=7)
    result._fields["products"] = {
        e.operator: getattr(result, e.operator) @ probes(result, e) for e in asked if e in PRODUCTS
    }
    for e in PRODUCTS:
        result._fields.pop(e.savefield, None)
        result._fields.pop(e.operator, None)
    return result


def probes(result: fxcurv.Result, e: Extension) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(getattr(result, e.operator).shape[0], 2).double()


# ---- on a rank ------------------------------


def wrapped(model: nn.Module, wrapper: str, count: int):
    """(model, mesh) as a user has them."""
    if wrapper in ("plain", "ddp"):
        return DistributedDataParallel(model) if wrapper == "ddp" else model, mesh_of(count)
    if wrapper == "fsdp":
        mesh = mesh_of(count)
    else:
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(list(model.children())[-1], mesh=mesh)
    return fully_shard(model, mesh=mesh), mesh


def cell(rank: int, count: int, wrapper: str, name: str, asked: list[Extension], want: fxcurv.Result) -> None:
    """One model in one wrapper: every cut of the batch has the whole batch's numbers, in the parameters' placements."""
    model, loss, x, y = made(name, 7)
    compiled_of, mesh = wrapped(model, wrapper, count)
    compiled = fxcurv.compile(compiled_of, loss, asked, mesh=mesh, check=None, update_buffers=False)
    for sizes in CUTS[count]:
        result = compiled(part(x, sizes, rank), part(y, sizes, rank), seed=7)
        compare(result, want, [e for e in asked if e not in PRODUCTS])
        for key, buffer in want.buffers.items():
            torch.testing.assert_close(result.buffers[key], buffer, rtol=1e-9, atol=1e-12)
        for e in asked:
            if e in PRODUCTS:
                got = getattr(result, e.operator) @ probes(result, e)
                torch.testing.assert_close(got, want.products[e.operator], rtol=1e-9, atol=1e-11)
        for key, p in model.named_parameters():
            for field in ("grad", *(e.savefield for e in asked if e.savefield in ("variance", "diag_ggn"))):
                value = getattr(result, field)[key]
                assert isinstance(value, DTensor) == isinstance(p, DTensor)
                if isinstance(p, DTensor):
                    assert (value.placements, value.device_mesh) == (p.placements, p.device_mesh)
    assert len(vars(compiled._programs.named)) == 1, "one program serves all sizes"


def refusals(rank: int, count: int) -> list[str]:
    """What has to be refused and is not, or not by name."""
    missed = []
    for name, kinds in REFUSED.items():
        model, loss, x, y = made(name, count)
        for kind in kinds:
            try:
                fxcurv.compile(model, loss, [kind()], mesh=mesh_of(count), check=None)(x[:1], y[:1])
                missed.append(f"{name} {kind.__name__}: not refused")
            except MixedSamplesError as error:
                if "mesh=" not in str(error):
                    missed.append(f"{name} {kind.__name__}: {error}")
    return missed


def cells(rank: int, count: int, known: dict) -> dict[str, str]:
    """What is wrong, by cell."""
    wrong: dict[str, str] = {}
    for name, (asked, want) in known.items():
        for wrapper in WRAPPERS:
            try:
                cell(rank, count, wrapper, name, asked, want)
            except Exception:
                wrong[f"{count} ranks, {wrapper}, {name}"] = traceback.format_exc()
    missed = refusals(rank, count) if count == 2 else []
    return {**wrong, **({"refusals": "\n".join(missed)} if missed else {})}


@pytest.mark.slow
@pytest.mark.parametrize("count", CUTS)
def test_every_cell(count):
    known = {}
    for name in MODELS:
        asked = asked_of(name)
        known[name] = asked, expected(name, asked)
    for wrong in on_ranks(count, cells, count, known, limit=3000):
        assert not wrong, "\n\n".join(f"==== {where}\n{what}" for where, what in wrong.items())
