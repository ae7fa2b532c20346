"""A private training run by Opacus' own engine is the same with fxcurv's gradients as with Opacus' hooks."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcurv.errors import LossError

opacus = pytest.importorskip("opacus")
plug = pytest.importorskip("fxcurv.plugs.opacus")
pytestmark = pytest.mark.filterwarnings("ignore")


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    return model, TensorDataset(torch.randn(24, 1, 4, 4), torch.randint(4, (24,)))


def private(model, data, reduction, hooks, rate):
    """The parameters after two epochs."""
    model = copy.deepcopy(model)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    optimizer, engine = torch.optim.SGD(model.parameters(), lr=0.1), opacus.PrivacyEngine()
    noise = torch.Generator().manual_seed(3)
    options = {"noise_multiplier": 0.3, "max_grad_norm": 0.5, "loss_reduction": reduction, "noise_generator": noise}
    torch.manual_seed(5)
    loader, empty = DataLoader(data, batch_size=rate), 0
    if hooks:
        wrapped, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **options)
    else:
        samples, optimizer, loader = plug.make_private(engine, model, loss, optimizer, loader, **options)
    for _ in range(2):
        for x, y in loader:
            empty += not len(x)
            if hooks:
                loss(wrapped(x), y).backward()
            else:
                samples(x, y)
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], empty, engine.get_epsilon(1e-5)


@pytest.mark.parametrize("reduction, rate", [("mean", 2), ("sum", 8)])
def test_private_training_is_the_same(reduction, rate):
    model, data = case()
    (found, empty, epsilon), (wanted, _, same) = (private(model, data, reduction, hooks, rate) for hooks in (False, True))
    assert epsilon == same and (empty or rate > 2), "Poisson sampling drew an empty batch"
    for got, want, before in zip(found, wanted, model.parameters(), strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got, before)


def test_virtual_steps_and_weights():
    model, data = case()
    (x, y), samples = data.tensors, plug.GradSamples(model, nn.CrossEntropyLoss())
    samples(x[:5], y[:5])
    samples(x[5:8], y[5:8])
    weight = model[3].weight.grad_sample
    assert [len(g) for g in weight] == [5, 3] and samples.reduction == "mean"
    losses = nn.functional.cross_entropy(model(x[:8]), y[:8], reduction="none")
    each = [torch.autograd.grad(loss, model[3].weight, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(torch.cat(weight), torch.stack(each))
    weighted = plug.GradSamples(model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4])))
    with pytest.raises(LossError, match="weights of their own"):
        weighted(x, y)
