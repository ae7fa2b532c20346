"""laplace-torch gives the same posterior with fxcurv's backends as with those that it has."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcurv.errors import ArgumentError

laplace = pytest.importorskip("laplace")
plug = pytest.importorskip("fxcurv.plugs.laplace")
pytestmark = pytest.mark.filterwarnings("ignore")


def case(likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(13, 3)
    y = torch.randint(2, (13,)) if likelihood == "classification" else torch.randn(13, 2)
    return model, DataLoader(TensorDataset(x, y), batch_size=6), x


def fitted(model, loader, likelihood, backend, subset, structure):
    more = {}
    if subset == "subnetwork":
        more["subnetwork_indices"] = torch.tensor([1, 4, 20])
    la = laplace.Laplace(
        model, likelihood, subset_of_weights=subset, hessian_structure=structure, backend=backend, **more
    )
    la.fit(loader)
    return la


SLOW = pytest.mark.slow


@pytest.mark.parametrize("likelihood", ["classification", pytest.param("regression", marks=SLOW)])
@pytest.mark.parametrize("subset, structure", [
    ("all", "kron"), ("all", "diag"), ("last_layer", "diag"), pytest.param("all", "full", marks=SLOW),
    pytest.param("last_layer", "full", marks=SLOW), pytest.param("last_layer", "kron", marks=SLOW),
    pytest.param("subnetwork", "full", marks=SLOW), pytest.param("subnetwork", "diag", marks=SLOW),
])  # fmt: skip
@pytest.mark.parametrize("name", ["GGN", "EF"])
def test_posteriors_are_the_same(likelihood, subset, structure, name):
    from laplace import curvature

    model, loader, x = case(likelihood)
    if (name, subset, structure) == ("EF", "last_layer", "diag"):  # where laplace-torch 0.3's own is zero
        found = fitted(model, loader, likelihood, plug.FxcurvEF, subset, structure)
        wanted = fitted(model, loader, likelihood, curvature.CurvlinopsEF, subset, "full")
        torch.testing.assert_close(found.H, wanted.H.diagonal(), rtol=1e-4, atol=1e-6)
        assert not fitted(model, loader, likelihood, curvature.CurvlinopsEF, subset, structure).H.any(), (
            "mended: drop this"
        )
        return
    found, wanted = (
        fitted(model, loader, likelihood, backend, subset, structure)
        for backend in (getattr(plug, f"Fxcurv{name}"), getattr(curvature, f"Curvlinops{name}"))
    )
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.log_marginal_likelihood(), wanted.log_marginal_likelihood(), rtol=1e-4, atol=1e-4)
    for got, want in zip(_tensors(found(x)), _tensors(wanted(x)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _tensors(value):
    return value if isinstance(value, tuple) else (value,)


class Scaled(nn.Module):
    """A parameter without a dimension, at which laplace-torch's own diagonal raises."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.layer(x) * self.scale


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GGN", "EF", "Hessian"])
def test_a_parameter_without_a_dimension(name):
    from laplace import curvature

    _, loader, _ = case("classification")
    model, ours = Scaled(), getattr(plug, f"Fxcurv{name}")
    found = fitted(model, loader, "classification", ours, "all", "full").H
    wanted = fitted(model, loader, "classification", getattr(curvature, f"Curvlinops{name}"), "all", "full").H
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    diagonal = fitted(model, loader, "classification", ours, "all", "diag").H
    torch.testing.assert_close(diagonal, found.diagonal(), rtol=1e-4, atol=1e-5)


def test_kronecker_factors_of_the_hessian_are_refused():
    model, loader, _ = case("classification")
    with pytest.raises(ArgumentError, match="backend=FxcurvGGN"):
        fitted(model, loader, "classification", plug.FxcurvHessian, "all", "kron")
