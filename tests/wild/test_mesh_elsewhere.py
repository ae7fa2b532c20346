"""A model that was compiled for a mesh, handed to what makes programs of its own."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxcurv
from fxcurv.errors import ArgumentError, ExtensionError
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


def test_products_of_samples_in_pairs(mesh):
    """Of one rank they are those without a mesh."""
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    vectors = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}  # which all ranks have
    asked = [GramGrad(), NTK(), Dots(vectors)]
    found = fxcurv.compile(model, nn.CrossEntropyLoss(), asked, mesh=mesh)(*batch)
    expected = fxcurv.compile(model, nn.CrossEntropyLoss(), asked)(*batch)
    for e in asked:
        torch.testing.assert_close(found[e], expected[e])
    assert found.dots["weight"].shape == (6, 2)
