"""A private training run by Opacus' own engine is the same with fxcurv's gradients as with Opacus' hooks."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcurv.backpack.context import current
from fxcurv.errors import ArgumentError, FieldError, LossError

opacus = pytest.importorskip("opacus")
plug = pytest.importorskip("fxcurv.plugs.opacus")
drop_in = pytest.importorskip("fxcurv.backpack.opacus")
pytestmark = pytest.mark.filterwarnings("ignore")
SLOW = pytest.mark.slow


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    return model, TensorDataset(torch.randn(24, 1, 4, 4), torch.randint(4, (24,)))


def private(model, data, reduction, by, rate):
    """The parameters after two epochs; `by`: Opacus' "hooks", the "plug", or Opacus' engine of the "drop-in"."""
    model = copy.deepcopy(model)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = drop_in.FxcurvPrivacyEngine() if by == "drop-in" else opacus.PrivacyEngine()
    noise = torch.Generator().manual_seed(3)
    options = {"noise_multiplier": 0.3, "max_grad_norm": 0.5, "loss_reduction": reduction, "noise_generator": noise}
    torch.manual_seed(5)
    loader, empty = DataLoader(data, batch_size=rate), 0
    if by != "plug":
        wrapped, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, **options
        )
    else:
        samples, optimizer, loader = plug.make_private(engine, model, loss, optimizer, loader, **options)
    for _ in range(2):
        for x, y in loader:
            empty += not len(x)
            if by != "plug":
                loss(wrapped(x), y).backward()
            else:
                samples(x, y)
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], empty, engine.get_epsilon(1e-5)


@pytest.mark.parametrize("reduction, rate", [("mean", 2), ("sum", 8)])
def test_private_training_is_the_same(reduction, rate):
    model, data = case()
    wanted, _, same = private(model, data, reduction, "hooks", rate)
    for by in ("plug", "drop-in"):
        found, empty, epsilon = private(model, data, reduction, by, rate)
        assert epsilon == same and (empty or rate > 2), "Poisson sampling drew an empty batch"
        for got, want, before in zip(found, wanted, model.parameters(), strict=True):
            torch.testing.assert_close(got, want)
            assert not torch.allclose(got, before)


def by_ghost_clipping(model, data, reduction, theirs):
    """The parameters after 20 steps and more, some batches of them virtual."""
    model = copy.deepcopy(model)
    loss, optimizer = nn.CrossEntropyLoss(reduction=reduction), torch.optim.SGD(model.parameters(), lr=0.1)
    engine, noise = opacus.PrivacyEngine(), torch.Generator().manual_seed(3)
    options = {
        "noise_multiplier": 0.3, "max_grad_norm": 0.5, "loss_reduction": reduction, "noise_generator": noise,
        "grad_sample_mode": "ghost", "poisson_sampling": False,
    }  # fmt: skip
    loader = DataLoader(data, batch_size=5)
    if theirs:
        wrapped, optimizer, criterion, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, criterion=loss, **options
        )
        step = lambda x, y: criterion(wrapped(x), y).backward()  # noqa: E731
    else:
        step, optimizer, loader = plug.make_private(engine, model, loss, optimizer, loader, **options)
    for epoch in range(5):
        for x, y in loader:
            optimizer.zero_grad()
            if epoch == 2:
                optimizer.signal_skip_step(do_skip=True)
                step(x[:3], y[:3])
                optimizer.step()
                optimizer.zero_grad()
                x, y = x[3:], y[3:]
            step(x, y)
            optimizer.step()
    return [p.detach() for p in model.parameters()], engine.get_epsilon(1e-5), step


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ghost_clipping_is_the_same(reduction):
    model, data = case()
    wanted, epsilon, _ = by_ghost_clipping(model, data, reduction, True)
    found, same, gradients = by_ghost_clipping(model, data, reduction, False)
    assert epsilon == same and gradients.reduction == reduction
    for got, want, before in zip(found, wanted, model.parameters(), strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got, before)


def test_modes_and_clippings():
    model, data = case()
    asked = model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=5)
    options = {"noise_multiplier": 1.0, "max_grad_norm": [1.0] * 4}
    with pytest.raises(ArgumentError, match="DPPerLayerOptimizer.*flat"):
        plug.make_private(opacus.PrivacyEngine(), *asked, grad_sample_mode="ghost", clipping="per_layer", **options)
    with pytest.raises(ArgumentError, match="'ew'.*'ghost'"):
        plug.make_private(opacus.PrivacyEngine(), *asked, grad_sample_mode="ew", **options)


class SamplesSecond(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, words):
        return self.linear(self.embedding(words)).mean(0)


@pytest.fixture
def cudnn_flags():
    """Opacus' sampler of embeddings sets one, which PyTorch's operator database, once imported, forbids."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield


@pytest.mark.usefixtures("cudnn_flags")
def test_engine_of_the_drop_in():
    """Samples second, several batches, evaluation, a model that runs twice, and the model as it was."""
    torch.manual_seed(0)
    model, words = SamplesSecond(), torch.randint(7, (5, 6))
    theirs, ours = (
        wrapper(copy.deepcopy(model), batch_first=False)
        for wrapper in (opacus.grad_sample.GradSampleModule, drop_in.FxcurvGradSampleModule)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for n in (6, 1, 0):
        for wrapped in (theirs, ours):
            nn.functional.cross_entropy(wrapped(words[:, :n]), torch.zeros(n).long()).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert [len(rows) for rows in p.grad_sample] == [6, 1, 0]
        for got, want in zip(p.grad_sample, q.grad_sample, strict=True):
            torch.testing.assert_close(got, want)
    ours.zero_grad()
    ours.eval()
    ours(words).sum().backward()
    assert all(p.grad_sample is None for p in ours.parameters())
    ours.train()
    with pytest.raises(FieldError, match="ran forward more than once"):
        (ours(words).sum() + ours(words[:, :2]).sum()).backward()
    assert current().asked == (), "what raised leaves nothing active"
    ours.forbid_grad_accumulation()
    ours.zero_grad()
    ours(words).sum().backward()
    with pytest.raises(ArgumentError, match="BatchMemoryManager"):
        ours(words).sum().backward()
    plain = ours.to_standard_module()
    assert type(plain) is SamplesSecond and not any(vars(p) for p in plain.parameters())
    with pytest.raises(ArgumentError, match="ClippedGrad"):
        drop_in.FxcurvPrivacyEngine()._prepare_model(plain, grad_sample_mode="ghost")
    with pytest.raises(ArgumentError, match="pass 'mean' or 'sum'"):
        drop_in.FxcurvGradSampleModule(plain, loss_reduction="none")


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


def looks_at_values(f, t):
    """A mean over the samples that count, which `vmap` does not take."""
    return nn.functional.cross_entropy(f, t, reduction="sum") / max(int((t >= 0).sum()), 1)


@pytest.mark.parametrize(
    "loss, first",
    [(nn.CrossEntropyLoss(), True), (nn.CrossEntropyLoss(), False), pytest.param(looks_at_values, True, marks=SLOW)],
)
def test_samples_that_a_mean_leaves_out(loss, first):
    """In the first batch or a later one: rows are gradients of each sample's own loss, and clipping is of these."""
    model, data = case()
    x, y = data.tensors
    ignored = torch.where(torch.arange(8) % 3 == 0, -100, y[8:16])
    samples, clipped = plug.GradSamples(model, loss), plug.ClippedGradients(model, loss, 0.5)
    if not first:
        for gradients in (samples, clipped):
            gradients(x[:8], y[:8])
        model.zero_grad()
        for p in model.parameters():
            del p.grad_sample
    samples(x[8:16], ignored)
    clipped(x[8:16], ignored)
    losses = nn.functional.cross_entropy(model(x[8:16]), ignored, reduction="none")
    own = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    want = [torch.stack(rows) for rows in zip(*own, strict=True)]
    norms = sum(rows.flatten(1).square().sum(1) for rows in want).sqrt()
    for p, rows in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad_sample, rows)
        torch.testing.assert_close(p.grad, torch.einsum("n,n...->...", (0.5 / norms).clamp(max=1).nan_to_num(), rows))


def test_weights_that_look_like_none():
    """Weights of classes whose mean is that of the first sample, in a batch behind one without any difference."""
    model, data = case()
    x, samples = data.tensors[0], plug.GradSamples(model, nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 1.5, 1])))
    samples(x[:3], torch.tensor([0, 0, 3]))
    with pytest.raises(LossError, match="weights of their own"):
        samples(x[:3], torch.tensor([0, 1, 2]))


def test_ghost_clipping_follows_the_optimizers_bound():
    model, data = case()
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    samples, optimizer, _ = plug.make_private(
        opacus.PrivacyEngine(), model, loss, optimizer, DataLoader(data, batch_size=5), noise_multiplier=1.0,
        max_grad_norm=1e-3, grad_sample_mode="ghost",
    )  # fmt: skip
    for bound in (1e-3, 1e-4):
        optimizer.max_grad_norm = bound
        optimizer.zero_grad()
        samples(*(t[:1] for t in data.tensors))
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert float(norm) == pytest.approx(bound, rel=1e-4) and samples.max_norm == bound
