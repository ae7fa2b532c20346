"""Attribution scores against their definitions with dense matrices, by plain autograd in float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv.errors import ArgumentError, ExtensionError, LossError
from fxcurv.extensions import EKFAC, KFAC, Projected, Quadratic
from fxcurv.plugs.attribution import Attribution, margin

DAMPING = 0.03
CE = nn.functional.cross_entropy


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def batches(n, size, seed):
    x, y = data(n, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


TRAIN, QUERIES = (9, 5, 1), (5, 3, 2)


def gradients(model, samples, loss=CE):
    """Name -> [N, *P], of each sample's own loss."""
    x, y = data(samples[0], samples[2])
    rows = [
        torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())) for i in range(len(x))
    ]
    return {n: torch.stack(g) for (n, _), g in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)}


def flat(named):
    return torch.cat([g.flatten(1) for g in named.values()], 1)


def ekfac(model):
    """The dense blocks of EKFAC with the empirical Fisher, of the mean loss, side by side on the diagonal."""
    each, x = gradients(model, TRAIN), data(TRAIN[0], TRAIN[2])[0]
    inputs, blocks = {"0": x, "2": torch.tanh(model[0](x)).detach()}, []
    for name, g in each.items():
        layer, kind = name.split(".")
        outputs = each[f"{layer}.bias"]
        q = torch.linalg.eigh(outputs.t() @ outputs)[1]
        if kind == "weight":
            q = torch.kron(q, torch.linalg.eigh(inputs[layer].t() @ inputs[layer])[1])
        moments = (g.flatten(1) @ q).square().mean(0)
        blocks.append(q * moments @ q.t())
    return torch.block_diag(*blocks)


def inverse(matrix):
    return torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix)).double())


@pytest.fixture(scope="module", params=["mean", pytest.param("sum", marks=pytest.mark.slow)])
def case(request):
    model = network()
    found = Attribution(model, nn.CrossEntropyLoss(reduction=request.param), batches(*TRAIN), check=None)
    return model, found, found.curvature()


def test_influence(case, tmp_path):
    """Also into a file, of blocks of 3 queries and 2."""
    model, attribution, curvature = case
    wanted = flat(gradients(model, QUERIES)) @ inverse(ekfac(model)) @ flat(gradients(model, TRAIN)).t()
    found = attribution.influence(batches(*QUERIES), curvature, DAMPING, to=tmp_path)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "scores.npy")), wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npy"]


def test_self_influence(case, tmp_path):
    model, attribution, curvature = case
    g = flat(gradients(model, TRAIN))
    wanted = (g @ inverse(ekfac(model)) * g).sum(1)
    torch.testing.assert_close(attribution.self_influence(curvature, DAMPING, to=tmp_path), wanted)


@pytest.mark.slow
def test_influence_by_other_factors_parameters_and_measures(case):
    model, attribution, _ = case
    curvature = attribution.curvature(KFAC(fisher="empirical", params="2.weight"))
    x, measure = data(TRAIN[0], TRAIN[2])[0], lambda f, y: f.gather(1, y.unsqueeze(1)).sum()
    b, a = gradients(model, TRAIN)["2.bias"], torch.tanh(model[0](x)).detach()
    block = torch.kron(b.t() @ b, a.t() @ a) / 81
    queries, train = (gradients(model, s, m)["2.weight"].flatten(1) for s, m in ((QUERIES, measure), (TRAIN, CE)))
    found = attribution.influence(batches(*QUERIES), curvature, DAMPING, measure=measure)
    torch.testing.assert_close(found, queries @ inverse(block) @ train.t())


@pytest.mark.slow
def test_tracin(case, tmp_path):
    model, attribution, _ = case
    before, states, wanted = {k: v.clone() for k, v in model.state_dict().items()}, [], 0
    for k, rate in enumerate((0.5, 0.25)):
        states.append({name: v * (1 + k) for name, v in before.items()})
        model.load_state_dict(states[-1])
        wanted = wanted + rate * flat(gradients(model, QUERIES)) @ flat(gradients(model, TRAIN)).t()
    model.load_state_dict(before)
    torch.testing.assert_close(attribution.tracin(batches(*QUERIES), states, (0.5, 0.25), to=tmp_path), wanted)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ArgumentError, match="2 checkpoints and 1 rates"):
        attribution.tracin(batches(*QUERIES), states, (0.5,))


@pytest.mark.slow
def test_trak(case, tmp_path):
    """With the kernel of all parameters for the projection, and R written out; of an ensemble the mean of both."""
    model, attribution, _ = case
    dim, project = 6, lambda named: sum(Projected(6, 4).of(named).values())
    one = lambda f, y: torch.log_softmax(f, 1)[0, y[0]].exp().logit()  # noqa: E731
    x, y = data(TRAIN[0], TRAIN[2])
    before, maps, slopes, states = {k: v.clone() for k, v in model.state_dict().items()}, [], [], []
    for scale in (1, 2):
        states.append({name: v * scale for name, v in before.items()})
        model.load_state_dict(states[-1])
        phi, of_queries = (project(gradients(model, s, one)) for s in (TRAIN, QUERIES))
        maps.append(of_queries @ torch.linalg.inv(phi.t() @ phi + 0.1 * torch.eye(dim).double()) @ phi.t())
        slopes.append(1 - torch.softmax(model(x), 1).detach()[torch.arange(9), y])
    model.load_state_dict(before)
    found = attribution.trak(batches(*QUERIES), dim, 4, measure=margin, damping=0.1)
    torch.testing.assert_close(found, maps[0] * slopes[0])
    wanted = (maps[0] + maps[1]) * (slopes[0] + slopes[1]) / 4
    found = attribution.trak(batches(*QUERIES), dim, 4, damping=0.1, models=states, to=tmp_path)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "scores.npy")), wanted)
    assert np.load(tmp_path / "measure_1" / "projected_total.npy").shape == (9, dim)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ArgumentError, match="models is empty"):
        attribution.trak(batches(*QUERIES), dim, models=[])


@pytest.mark.slow
def test_blocks_of_weight_and_bias_together(case):
    model, attribution, _ = case
    curvature = attribution.curvature(EKFAC(fisher="empirical", joint=True))
    each, queries = gradients(model, TRAIN), gradients(model, QUERIES)
    x = data(TRAIN[0], TRAIN[2])[0]
    wanted = own = 0
    for layer, a in {"0": x, "2": torch.tanh(model[0](x)).detach()}.items():
        g, v = (
            torch.cat([t[f"{layer}.weight"], t[f"{layer}.bias"].unsqueeze(2)], 2).flatten(1) for t in (each, queries)
        )
        a, b = torch.cat([a, torch.ones(len(a), 1)], 1), each[f"{layer}.bias"]
        q = torch.kron(torch.linalg.eigh(b.t() @ b)[1], torch.linalg.eigh(a.t() @ a)[1])
        solve = inverse(q * (g @ q).square().mean(0) @ q.t())
        wanted, own = wanted + v @ solve @ g.t(), own + (g @ solve * g).sum(1)
    torch.testing.assert_close(attribution.influence(batches(*QUERIES), curvature, DAMPING), wanted)
    torch.testing.assert_close(attribution.self_influence(curvature, DAMPING), own)
    with pytest.raises(ExtensionError, match="pass total=True"):
        fxcurv.compile(model, nn.CrossEntropyLoss(), [Quadratic(metric=curvature)])(*data(3, 0))
    with pytest.raises(ExtensionError, match="0.bias"):
        fxcurv.compile(model, nn.CrossEntropyLoss(), [Quadratic(metric=curvature, params="0.weight")])(*data(3, 0))


@pytest.mark.slow
def test_features_go_to_a_file(case, tmp_path):
    model, attribution, _ = case
    wanted = sum(Projected(6).of(gradients(model, TRAIN)).values())
    torch.testing.assert_close(attribution.features(6, to=tmp_path), wanted)
    assert np.load(tmp_path / "projected_total.npy").shape == (9, 6)


class Stopped(Exception):
    """A killed process."""


class Stops:
    """A loader that ends with an error after `whole` batches."""

    def __init__(self, of, whole):
        self.of, self.whole = of, whole

    def __iter__(self):
        for k, batch in enumerate(self.of):
            if k == self.whole:
                raise Stopped
            yield batch


@pytest.mark.slow
def test_goes_on_where_it_was(case, tmp_path):
    model, attribution, curvature = case
    queries = batches(*QUERIES)
    with pytest.raises(Stopped):
        attribution.influence(Stops(queries, 1), curvature, DAMPING, to=tmp_path)
    with pytest.raises(ArgumentError, match="damping=0.03, not 0.06"):
        attribution.influence(queries, curvature, 2 * DAMPING, to=tmp_path)
    with pytest.raises(ArgumentError, match="another measure"):
        attribution.influence(queries, curvature, DAMPING, to=tmp_path, measure=lambda f, y: (f * f).sum())
    train = batches(TRAIN[0] + 1, *TRAIN[1:])
    with pytest.raises(ArgumentError, match="the training data differ"):
        Attribution(model, attribution.loss, train).influence(queries, curvature, DAMPING, to=tmp_path)
    with pytest.raises(ArgumentError, match="block 0 of the queries is another"):
        attribution.influence(queries[1:], curvature, DAMPING, to=tmp_path)
    counted, scores = [], Attribution._gradients

    def counting(self, inputs, *rest):
        counted.append(len(inputs))
        return scores(self, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attribution, "_gradients", counting)
        found = attribution.influence(queries, curvature, DAMPING, to=tmp_path)
    assert counted == [2]
    wanted = flat(gradients(model, QUERIES)) @ inverse(ekfac(model)) @ flat(gradients(model, TRAIN)).t()
    torch.testing.assert_close(found, wanted)


def test_what_is_refused():
    with pytest.raises(ArgumentError, match="train is an iterator"):
        Attribution(network(), nn.CrossEntropyLoss(), iter(batches(*TRAIN)))
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 5]).double())
    with pytest.raises(LossError, match="weights of their own"):
        Attribution(network(), weighted, batches(*TRAIN), check=None).influence(batches(*QUERIES))
    with pytest.raises(ArgumentError, match="no queries"):
        Attribution(network(), nn.CrossEntropyLoss(), batches(*TRAIN)).influence([])


@pytest.mark.parametrize("other", ["activation", "unpack", "order"])
def test_a_folder_of_another_call_is_refused(tmp_path, other):
    """Of another structure with the same parameters; of data that is unpacked otherwise, as objects of a loader's own."""

    class Own:
        def __init__(self, pair):
            self.pair = pair

    def attribution(changed):
        model = network()
        if changed and other == "activation":
            model[1] = nn.ReLU()
        factor = 2 if changed and other == "unpack" else 1
        train = [Own(pair) for pair in batches(*TRAIN)]
        train = train[::-1] if changed and other == "order" else train
        unpack = lambda b: (factor * b.pair[0], b.pair[1])  # noqa: E731
        return Attribution(model, nn.CrossEntropyLoss(), train, unpack=unpack, check=None, progress=False)

    queries = [Own(pair) for pair in batches(*QUERIES)]
    with pytest.raises(Stopped):
        attribution(False).influence(Stops(queries, 1), to=tmp_path)
    with pytest.raises(ArgumentError, match="another module '1'" if other == "activation" else "training data differ"):
        attribution(True).influence(queries, to=tmp_path)


def test_data_in_another_order_is_refused():
    shuffled = DataLoader(TensorDataset(*data(TRAIN[0], TRAIN[2])), batch_size=3, shuffle=True)
    made = Attribution(network(), nn.CrossEntropyLoss(), shuffled, check=None, progress=False)
    with pytest.raises(ArgumentError, match="the training data comes in another order"):
        made.influence(batches(*QUERIES))
    made = Attribution(network(), nn.CrossEntropyLoss(), batches(*TRAIN), check=None, progress=False)
    states = [made.model.state_dict()] * 2
    with pytest.raises(ArgumentError, match="the data of the queries comes in another order"):
        made.tracin(shuffled, states, (0.5, 0.25))
