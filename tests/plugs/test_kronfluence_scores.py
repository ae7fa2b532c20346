"""Influence by EKFAC is what kronfluence gives, on the model and task of its example `uci`; data that needs no download."""

import copy

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcurv.extensions import EKFAC
from fxcurv.plugs.attribution import Attribution

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DAMPING = 1e-3


def case():
    """kronfluence's network of its example, trained a little; 200 samples and 10 queries."""
    torch.manual_seed(0)
    sizes = [10, 128, 128, 128]
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(128, 1))
    x, y = (torch.tensor(t, dtype=torch.float32) for t in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[:200]), y[:200]).backward()
        optimizer.step()
    return model, TensorDataset(x[:200], y[:200]), TensorDataset(x[200:210], y[200:210])


def theirs(model, train, queries, folder):
    """(pairwise scores, self-influence)."""
    pytest.importorskip("kronfluence", reason="compares with kronfluence, of the extra `plugs`")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Regression(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task = Regression()
    analyzer = Analyzer("uci", prepare_model(model, task), task, cpu=True, output_dir=str(folder), disable_tqdm=True)
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    analyzer.fit_all_factors("ekfac", train, per_device_batch_size=100, factor_args=arguments)
    damped = ScoreArguments(damping_factor=DAMPING)
    sizes = {"per_device_query_batch_size": 5, "per_device_train_batch_size": 100}
    analyzer.compute_pairwise_scores("pairs", "ekfac", queries, train, score_args=damped, **sizes)
    analyzer.compute_self_scores("self", "ekfac", train, score_args=damped, per_device_train_batch_size=100)
    return analyzer.load_pairwise_scores("pairs")["all_modules"], analyzer.load_self_scores("self")["all_modules"]


def test_scores_are_those_of_kronfluence(tmp_path):
    model, train, queries = case()
    wanted, wanted_self = theirs(copy.deepcopy(model), train, queries, tmp_path)
    model = model.double()
    train, queries = (TensorDataset(*(t.double() for t in of.tensors)) for of in (train, queries))
    attribution = Attribution(model, nn.MSELoss(reduction="sum"), DataLoader(train, batch_size=100), progress=False)
    curvature = attribution.curvature(EKFAC(fisher="empirical", weight_sharing="expand", joint=True))
    found = attribution.influence(DataLoader(queries, batch_size=5), curvature, DAMPING)
    for got, want in ((found, wanted), (attribution.self_influence(curvature, DAMPING), wanted_self)):
        assert got.shape == want.shape
        assert (got - want).abs().max() < 2e-5 * want.abs().max()  # kronfluence computes in float32
