"""A model that was compiled for a mesh, handed to what makes programs of its own."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxcurv
from fxcurv.errors import ArgumentError, ExtensionError, MixedSamplesError
from fxcurv.extensions import NTK, BatchGrad, Dots, GramGrad, Variance
from fxcurv.linear import GGN
from fxcurv.optim import DiagGGN


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_other_programs_are_of_all_ranks_too(mesh):
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [], mesh=mesh)
    assert compiled.asking([Variance()])(*batch).sizes == (6,)
    with pytest.raises(ExtensionError, match="different samples"):
        compiled.asking([BatchGrad(subsampling=[0])])
    with pytest.raises(ArgumentError, match="mesh="):
        GGN(compiled, batch)
    optimizer = DiagGGN(model, nn.CrossEntropyLoss(), interval=2, mesh=mesh)
    assert [optimizer.step(batch, seed=k).sizes for k in range(2)] == [(6,), (6,)]


@pytest.mark.parametrize("extension", [GramGrad(), pytest.param(NTK(), marks=pytest.mark.slow)], ids=["gram", "ntk"])
def test_pairs_of_samples_on_different_ranks_are_refused(mesh, extension):
    model, batch = nn.Linear(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [extension], mesh=mesh)
    with pytest.raises(MixedSamplesError, match="samples of other ranks.*Way out"):
        compiled(*batch)
    vectors = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}  # which all ranks have
    assert compiled.asking([Dots(vectors)])(*batch).dots["weight"].shape == (6, 2)
