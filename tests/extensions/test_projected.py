"""Random projections of individual gradients against gradients by plain autograd times the matrix itself."""

import pytest
import torch
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import ExtensionError
from fxcurv.extensions import Dots, Projected


class Net(nn.Module):
    """A table, a layer at shared positions, one used twice, a convolution, a scale, one that is not reached."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.a = nn.Embedding(6, 4, padding_idx=0), nn.Conv1d(4, 5, 2), nn.Linear(5, 5)
        self.b, self.unused = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.ones(2))

    def forward(self, words):
        z = self.conv(self.table(words).mT).mT
        return self.a(torch.tanh(self.a(z))).mean(1) @ self.b


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model, x, y = Net().double(), torch.randint(6, (7, 4)), torch.randint(3, (7,))
    each = Oracle(model, nn.CrossEntropyLoss(), x, y, kind="ce").grad_batch()
    kind = Projected(40, seed=3)
    matrices = {
        n: kind.of({n: torch.eye(p.numel()).double().reshape(-1, *p.shape)})[n] for n, p in model.named_parameters()
    }
    vectors = {n: torch.randn(2, *p.shape).double() for n, p in model.named_parameters()}
    asked = [kind, Projected(40, seed=3, total=True, savefield="both"), Dots(vectors, total=True)]
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), asked, debug=True)
    return model, x, y, each, matrices, compiled, vectors


def test_values(case):
    _, x, y, each, matrices, compiled, vectors = case
    result = compiled(x, y, seed=1)
    for name, g in each.items():
        assert set((matrices[name] * 40**0.5).round(decimals=12).unique().tolist()) == {-1, 1}
        torch.testing.assert_close(result.projected[name], g.flatten(1) @ matrices[name])
    assert result.both == {} and result.dots == {}
    torch.testing.assert_close(result.both_total, sum(g.flatten(1) @ matrices[n] for n, g in each.items()))
    torch.testing.assert_close(
        result.dots_total, sum(g.flatten(1) @ vectors[n].flatten(1).t() for n, g in each.items())
    )
    assert compiled(x[:0], y[:0]).both_total.shape == (0, 40)


def test_vectors_are_read_at_every_call(case):
    _, x, y, each, _, compiled, vectors = case
    compiled(x, y)
    with torch.no_grad():
        for v in vectors.values():
            v.neg_()
    wanted = sum(g.flatten(1) @ vectors[n].flatten(1).t() for n, g in each.items())
    torch.testing.assert_close(compiled(x, y).dots_total, wanted)


def test_of_a_data_set(case, tmp_path):
    """Batches do not matter, nor does it where rows are kept."""
    _, x, y, *_, compiled, _ = case
    wanted, batches = compiled(x, y), list(zip(x.split(3), y.split(3), strict=True))
    found = fxcurv.over(compiled, batches, to=tmp_path)
    torch.testing.assert_close(found.both_total, wanted.both_total)
    torch.testing.assert_close(found.dots_total, wanted.dots_total)
    torch.testing.assert_close(found.projected["b"], wanted.projected["b"])
    assert found.both == {} and (tmp_path / "both_total.npy").exists()


@pytest.mark.slow
def test_which_parameters_there_are_does_not_matter(case):
    model, x, y, each, matrices, *_ = case
    asked = [Projected(40, seed=3, params="a.weight"), Projected(40, savefield="p")]
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), asked)(x, y)
    assert list(result.projected) == ["a.weight"]
    torch.testing.assert_close(result.projected["a.weight"], each["a.weight"].flatten(1) @ matrices["a.weight"])
    assert not torch.allclose(result.p["a.weight"], result.projected["a.weight"])


@pytest.mark.slow
def test_by_token():
    torch.manual_seed(0)
    model, words = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double(), torch.randint(5, (3, 2))
    loss = lambda f, t: nn.functional.cross_entropy(f.flatten(0, 1), t.flatten(), reduction="sum")  # noqa: E731
    vectors = {n: torch.randn(2, *p.shape).double() for n, p in model.named_parameters()}
    result = fxcurv.compile(model, loss, [Projected(8), Dots(vectors)], sample="token")(words, words)
    for name, p in model.named_parameters():
        each = torch.stack([
            torch.autograd.grad(nn.functional.cross_entropy(model(words)[n, t], words[n, t]), p)[0]
            for n in range(3) for t in range(2)
        ])  # fmt: skip
        torch.testing.assert_close(result.projected[name].flatten(0, 1), Projected(8).of({name: each})[name])
        torch.testing.assert_close(result.dots[name].flatten(0, 1), each.flatten(1) @ vectors[name].flatten(1).t())


def test_rows_of_a_wide_layer_are_not_formed():
    """[N, *P] of the table has 16 * 50000 entries, of the layer 16 * 6400; the program has neither."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 50), nn.Linear(50, 80), nn.Tanh(), nn.Flatten(), nn.Linear(160, 3))
    x, y = torch.randint(1000, (16, 2)), torch.randint(3, (16,))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [Projected(8, total=True)], check=None)
    compiled(x, y)
    nodes = [n for n in compiled.lower(x, y).program.graph.nodes if n.op not in ("placeholder", "get_attr")]
    sizes = [int(v.numel()) for n in nodes for v in [n.meta.get("val")] if isinstance(v, torch.Tensor)]
    assert max(sizes) <= 50000  # the gradient of the table


@pytest.mark.parametrize("options, says", [({"dim": 0}, "dim=0"), ({"seed": "x"}, "seed='x'")])
def test_wrong_arguments(options, says):
    with pytest.raises(ExtensionError, match=says):
        Projected(**options)


def test_no_derivative():
    model, x, y = nn.Linear(2, 3), torch.randn(2, 2), torch.zeros(2).long()
    with pytest.raises(ExtensionError, match="create_graph=True has no derivative"):
        fxcurv.compile(model, nn.CrossEntropyLoss(), [Projected(4)])(x, y, create_graph=True)
