"""Placements are never wrong: what moves, joins or compares samples is refused by name, all else equals autograd.

The oracle is the gradient of sample n's term of the loss of the full batch. Sizes equal to the batch size are everywhere:
N = D = C = 4, and once more with sizes that all differ.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from torch import nn

import fxcurv
from fxcurv.errors import FxcurvError, MixedSamplesError, UnsupportedOpError
from fxcurv.extensions import BatchGrad, BatchL2Grad, DiagGGNExact

EQUAL, UNEQUAL = (4, 4, 4), (5, 4, 3)  # N, D, C
RIGHT, REFUSED, CAREFUL = "right", "refused", "refused, though samples are apart"
SHUFFLED = torch.tensor([1, 0, 3, 2, 4])


def arange(h):
    return torch.arange(h.size(0))


def wide(index, h):
    return index.unsqueeze(1).expand(-1, h.shape[1])


def aggregated(h, e):
    return torch.zeros_like(h).index_add(0, e[1], h[e[0]])


def put(h, index, value, accumulate=False):
    return torch.index_put(h, (index,), value, accumulate)


def triples(h, extra):
    """[N, D] -> [N, 3, D], of which every position is different."""
    return torch.stack([h, h * 2, h * extra], 1)


# name -> (function of h [N, D], own index [N] from the sample's data, edges [2, E] that are no sample's own; outcome)
MODELS = {
    # indices along the samples' axis
    "messages by index_add": (lambda h, i, e: aggregated(h, e), REFUSED),
    "messages by index_add to themselves": (lambda h, i, e: h.index_add(0, e[1], h[e[0]]), REFUSED),
    "messages by scatter_add": (lambda h, i, e: torch.zeros_like(h).scatter_add(0, wide(i, h), h), REFUSED),
    "messages by scatter_reduce": (lambda h, i, e: h.scatter_reduce(0, wide(i, h), h, "mean"), REFUSED),
    "largest message": (lambda h, i, e: h.scatter_reduce(0, wide(i, h), h, "amax"), REFUSED),
    "messages by index_reduce": (lambda h, i, e: h.index_reduce(0, i, h, "mean"), REFUSED),
    "messages by scatter": (lambda h, i, e: h.scatter(0, wide(i, h), h), REFUSED),
    "messages by index_copy": (lambda h, i, e: h.index_copy(0, i, h), REFUSED),
    "messages by index_put": (lambda h, i, e: put(h, i, h * 2), REFUSED),
    "messages by index_put that add": (lambda h, i, e: put(h, i, h * 2, True), REFUSED),
    "rows by gather": (lambda h, i, e: h + h.gather(0, wide(i, h)), REFUSED),
    "rows by take_along_dim": (lambda h, i, e: h + h.take_along_dim(wide(i, h), 0), REFUSED),
    "rows by index_select": (lambda h, i, e: h + h.index_select(0, i), REFUSED),
    "rows by indexing": (lambda h, i, e: h + h[i], REFUSED),
    "rows by embedding": (lambda h, i, e: h + F.embedding(i, h), REFUSED),
    "rows by take": (lambda h, i, e: h + h.take(wide(i, h)), REFUSED),
    "rows by a merged axis": (lambda h, i, e: h + h.reshape(-1)[wide(i, h)], REFUSED),
    "rows of edges": (lambda h, i, e: h + h[e[1]][: h.shape[0]] if len(h) == 4 else h + h[e[1][:5]], REFUSED),
    "nearest neighbours": (lambda h, i, e: h + h[torch.cdist(h, h).topk(2, largest=False).indices[:, 1]], REFUSED),
    "columns of the batch": (lambda h, i, e: h + h.t().index_select(1, i).t(), REFUSED),
    "rows in another dimension": (lambda h, i, e: h + h.t().gather(1, wide(i, h).t()).t(), REFUSED),
    "rows of squares": (lambda h, i, e: h + (h.unsqueeze(0) * h.unsqueeze(2).permute(2, 0, 1)[:1])[0][i], REFUSED),
    "masked_scatter": (lambda h, i, e: h.masked_scatter(h > 0, h * 2), REFUSED),
    "masked_scatter from parameters": (lambda h, i, e: torch.zeros_like(h).masked_scatter(h.detach() > 0, h), REFUSED),
    "index_fill": (lambda h, i, e: h.index_fill(0, i, 0.5) * h, RIGHT),
    # the same along another axis, within a sample
    "gather within": (lambda h, i, e: h * h.gather(1, i.unsqueeze(1) % h.shape[1]), RIGHT),
    "take_along_dim within": (lambda h, i, e: h * h.take_along_dim(i.unsqueeze(1) % h.shape[1], 1), RIGHT),
    "index_select within": (lambda h, i, e: h * h.index_select(1, e[0][: h.shape[1]] % h.shape[1]), RIGHT),
    "index_add within": (lambda h, i, e: h.index_add(1, e[1][: h.shape[1]] % h.shape[1], h), RIGHT),
    "scatter_add within": (lambda h, i, e: h.scatter_add(1, wide(i, h) % h.shape[1], h * 2), RIGHT),
    "scatter within": (lambda h, i, e: torch.zeros_like(h).scatter(1, h.argsort(1), h), RIGHT),
    "sorted by an index": (lambda h, i, e: h.gather(1, h.argsort(1)), RIGHT),
    "flipped by an index": (lambda h, i, e: h[:, torch.arange(h.shape[1] - 1, -1, -1)] + h, RIGHT),
    "index_put within": (lambda h, i, e: torch.index_put(h, (arange(h), i % h.shape[1]), h[:, 0] * 2), RIGHT),
    "positions by indexing": (lambda h, i, e: triples(h, 3)[arange(h), i % 3], RIGHT),
    "positions by indexing in a merged axis": (
        lambda h, i, e: triples(h, 3).flatten(0, 1)[arange(h) * 3 + 1], RIGHT),
    "positions in a merged axis by an index of the data": (
        lambda h, i, e: triples(h, 3).flatten(0, 1)[arange(h) * 3 + i % 3], CAREFUL),
    # indices that depend on no input
    "in order": (lambda h, i, e: h + h[arange(h)] * h, RIGHT),
    "in order by index_select": (lambda h, i, e: h + h.index_select(0, arange(h)), RIGHT),
    "in order by gather": (lambda h, i, e: h.gather(0, wide(arange(h), h)), RIGHT),
    "in order by index_add": (lambda h, i, e: torch.zeros_like(h).index_add(0, arange(h), h), RIGHT),
    "in order by a remainder": (lambda h, i, e: h + h[arange(h) % h.size(0)], RIGHT),
    "backwards by an index": (lambda h, i, e: h[torch.arange(h.size(0) - 1, -1, -1)], REFUSED),
    "in order for small batches only": (lambda h, i, e: h[arange(h).clamp(max=3)], {4: RIGHT, 5: REFUSED}),
    "shifted by an index": (lambda h, i, e: h + h[(arange(h) + 1) % h.size(0)], REFUSED),
    "the first, by an index": (lambda h, i, e: h + h[arange(h) * 0], REFUSED),
    "shuffled by a constant": (lambda h, i, e: h + h[SHUFFLED[: h.size(0)]], REFUSED),
    # order along the samples' axis
    "cumsum": (lambda h, i, e: h.cumsum(0), REFUSED),
    "cumprod": (lambda h, i, e: h.cumprod(0), REFUSED),
    "cummax": (lambda h, i, e: h.cummax(0).values, REFUSED),
    "logcumsumexp": (lambda h, i, e: h.logcumsumexp(0), REFUSED),
    "sort": (lambda h, i, e: h.sort(0).values, REFUSED),
    "topk": (lambda h, i, e: h - h.topk(2, 0).values[:1], REFUSED),
    "median": (lambda h, i, e: h - h.median(0).values, REFUSED),
    "flip": (lambda h, i, e: h.flip(0), REFUSED),
    "roll": (lambda h, i, e: h - h.roll(1, 0), REFUSED),
    "roll without an axis": (lambda h, i, e: h - h.roll(1), REFUSED),
    "diff": (lambda h, i, e: torch.cat([h[:1], h[1:] - h[:-1]]), REFUSED),
    "shift by padding": (lambda h, i, e: h - F.pad(h, (0, 0, 1, -1)), REFUSED),
    "shift by padding to the left": (lambda h, i, e: F.pad(h.t(), (-1, 1)).t(), REFUSED),
    "circular padding": (lambda h, i, e: F.pad(h[None], (0, 0, 1, 1), "circular")[0, 2:], REFUSED),
    "flip within": (lambda h, i, e: h * h.flip(1), RIGHT),
    "roll within": (lambda h, i, e: h * h.roll(1, 1), RIGHT),
    "cumsum within": (lambda h, i, e: h.cumsum(1).sin(), RIGHT),
    "sort within": (lambda h, i, e: h.sort(1).values * h, RIGHT),
    "padding within": (lambda h, i, e: F.pad(h, (1, -1)) * h, RIGHT),
    # shapes
    "transposed": (lambda h, i, e: h + h.t() if h.shape[0] == h.shape[1] else h.t().reshape(h.shape), REFUSED),
    "merged in another order": (lambda h, i, e: h.t().reshape(h.shape), REFUSED),
    "split in another place": (lambda h, i, e: h.reshape(-1, h.shape[0]).t().reshape(h.shape), REFUSED),
    "merged and split again": (lambda h, i, e: h.reshape(-1).reshape(-1, 2, h.shape[1] // 2).flatten(1), RIGHT),
    "merged with copies": (lambda h, i, e: torch.tanh(triples(h, 3).flatten(0, 1)).view(h.shape[0], 3, -1).sum(1), RIGHT),
    "copies, wrongly split": (lambda h, i, e: torch.tanh(triples(h, 3).flatten(0, 1)).view(3, h.shape[0], -1).sum(0), REFUSED),
    "repeated and back": (lambda h, i, e: torch.tanh(h.repeat(2, 1)).view(2, -1, h.shape[1]).mean(0), RIGHT),
    "repeated and split wrongly": (lambda h, i, e: torch.tanh(h.repeat(2, 1)).view(-1, 2, h.shape[1]).mean(1), REFUSED),
    "interleaved and back": (lambda h, i, e: h.repeat_interleave(2, 0).view(-1, 2, h.shape[1]).prod(1), RIGHT),
    "interleaved and split wrongly": (lambda h, i, e: h.repeat_interleave(2, 0).view(2, -1, h.shape[1]).prod(0), REFUSED),
    "tiled": (lambda h, i, e: h.tile(2, 1)[: h.shape[0]], RIGHT),
    "stacked in front": (lambda h, i, e: torch.stack([h, h * 2]).prod(0), RIGHT),
    "joined along the samples": (lambda h, i, e: torch.cat([h[1:], h[:1]]), REFUSED),
    "joined with itself": (lambda h, i, e: torch.cat([h, h])[1 : h.shape[0] + 1], REFUSED),
    "one part of the batch": (lambda h, i, e: torch.cat([t.tanh() for t in h.chunk(1)]), RIGHT),
    "halves of the batch": (lambda h, i, e: torch.cat([t.tanh() for t in h.split(2)]), CAREFUL),
    "halves exchanged": (lambda h, i, e: torch.cat(h.chunk(2)[::-1]), REFUSED),
    "unbound": (lambda h, i, e: torch.stack(h.unbind(0)[::-1]), REFUSED),
    "windows over the batch": (lambda h, i, e: F.pad(h, (0, 0, 1, 0)).unfold(0, 2, 1).sum(-1), REFUSED),
    "strides": (lambda h, i, e: h.as_strided(h.shape, (1, h.shape[0])) + h, REFUSED),
    "windows within": (lambda h, i, e: F.pad(h, (1, 0)).unfold(1, 2, 1).prod(-1), RIGHT),
    "diagonal": (lambda h, i, e: h + h.diagonal().sum(), REFUSED),
    "a matrix of diagonals": (lambda h, i, e: torch.diag_embed(h).sum(1) * h, RIGHT),
    "triangle": (lambda h, i, e: h.tril() + h, RIGHT),
    # every sample beside every other
    "column against row": (lambda h, i, e: h * (h[:, :1] - h[:, 0]).square().mean(1, keepdim=True), REFUSED),
    "column against a row of features": (lambda h, i, e: h * (h[:, :1] - h[:, :1].t()).square().sum(1, keepdim=True), REFUSED),
    "row against column": (lambda h, i, e: h * (h[:, 0] * h[:, :1]).sum(0).unsqueeze(1), REFUSED),
    "gram matrix": (lambda h, i, e: (h @ h.t()).softmax(1) @ h, REFUSED),
    "gram matrix by einsum": (lambda h, i, e: h * torch.einsum("nd,md->nm", h, h).sum(1, keepdim=True), REFUSED),
    "covariance": (lambda h, i, e: h @ (h.t() @ h), REFUSED),
    "distances": (lambda h, i, e: h * torch.cdist(h, h).sum(1, keepdim=True), REFUSED),
    "attention over the batch": (
        lambda h, i, e: F.scaled_dot_product_attention(h[None], h[None], h[None])[0], REFUSED),
    "inner products within": (lambda h, i, e: h * (h.unsqueeze(1) @ h.unsqueeze(2)).squeeze(2), RIGHT),
    "outer products within": (lambda h, i, e: (h.unsqueeze(2) * h.unsqueeze(1)).softmax(1).sum(2), RIGHT),
    # statistics
    "residual to the mean": (lambda h, i, e: h - h.mean(0), REFUSED),
    "residual to the mean by an op without a rule": (
        lambda h, i, e: torch.lerp(h, h.mean(0, keepdim=True).expand_as(h), 0.3), REFUSED),
    "mean beside samples, no rule": (lambda h, i, e: torch.addcmul(h, h, h.mean(0)), REFUSED),
    "mean, repeated by an op without a rule": (
        lambda h, i, e: h + h.mean(0, keepdim=True).repeat_interleave(h.shape[0], 0), REFUSED),
    "mean written to samples": (lambda h, i, e: h.index_add(0, i, h.mean(0, keepdim=True).expand_as(h)), REFUSED),
    "mean written to features": (lambda h, i, e: h.scatter_add(1, wide(i, h) % h.shape[1], h.mean(0).expand_as(h)), REFUSED),
    "sum of outer products with samples": (lambda h, i, e: torch.cdist(h, h.mean(0, keepdim=True)) * h, REFUSED),
    "normalised over the batch": (lambda h, i, e: F.normalize(h, dim=0), REFUSED),
    "softmax over the batch": (lambda h, i, e: h.softmax(0), REFUSED),
    "logsumexp over the batch": (lambda h, i, e: h - h.logsumexp(0), REFUSED),
    "standardised": (lambda h, i, e: (h - h.mean(0)) / h.std(0), REFUSED),
    "batch norm": (lambda h, i, e: F.batch_norm(h, None, None, training=True), REFUSED),
    "layer norm over the batch": (lambda h, i, e: F.layer_norm(h.t(), (h.shape[0],)).t(), REFUSED),
    "instance norm over the batch": (lambda h, i, e: F.instance_norm(h.t()[None])[0].t(), REFUSED),
    "group norm of one image": (lambda h, i, e: F.group_norm(h.t()[None], 2)[0].t(), REFUSED),
    "convolved over the batch": (lambda h, i, e: F.avg_pool1d(h.t()[None], 3, 1, 1)[0].t(), REFUSED),
    "norm of the batch": (lambda h, i, e: h / h.norm(), REFUSED),
    "normalised": (lambda h, i, e: F.normalize(h, dim=1), RIGHT),
    "standardised by a detached mean": (lambda h, i, e: h - h.mean(0).detach(), RIGHT),
    "standardised inputs": (lambda h, i, e: h * (i - i.float().mean()).unsqueeze(1), RIGHT),
    # mixed before an op that has no rule
    "messages of messages": (
        lambda h, i, e: torch.zeros_like(h).index_add(0, arange(h), torch.tanh(aggregated(h, e))), REFUSED),
    "gather of what is mixed": (
        lambda h, i, e: h.gather(1, torch.ones_like(wide(i, h))) * h.softmax(0).gather(1, wide(i, h) * 0), REFUSED),
    "grid sample of what is mixed": (
        lambda h, i, e: h + F.grid_sample(h.softmax(0)[:, None, None], torch.zeros_like(h[:, :1, None, None].expand(-1, 1, 1, 2)),
                                          align_corners=False)[:, 0, 0], REFUSED),
    "positions from what is mixed": (
        lambda h, i, e: h * F.grid_sample(h[:, None, None], h.softmax(0)[:, None, None, :2], align_corners=False)[:, 0, 0],
        REFUSED),
}  # fmt: skip

LOSSES = {
    "log probabilities by targets": (lambda f, y: -f.log_softmax(1)[arange(f), y].mean(), RIGHT),
    "log probabilities by gather": (lambda f, y: -f.log_softmax(1).gather(1, y[:, None]).mean(), RIGHT),
    "log probabilities by nll": (lambda f, y: F.nll_loss(f.log_softmax(1), y), RIGHT),
    "margin": (lambda f, y: (1 + f - f.gather(1, y[:, None])).relu().square().sum(), RIGHT),
    "column of targets against a row": (lambda f, y: (f[:, :1] - y.float() / 3).square().mean(), RIGHT),
    "row of outputs against a column of targets": (lambda f, y: (f[:, 0] - y[:, None].float()).square().mean(), RIGHT),
    "rows of targets": (lambda f, y: F.cross_entropy(f[y], y), CAREFUL),
    "samples of one class": (lambda f, y: (torch.zeros_like(f).index_add(0, y, f)).square().sum(), REFUSED),
    "samples of one class, linear": (lambda f, y: (torch.zeros_like(f).index_add(0, y, f)).sum() + f.square().sum(), RIGHT),
    "ranks": (lambda f, y: (f[:, 0] - f[:, :1]).exp().sum(), REFUSED),
    "contrastive": (lambda f, y: F.cross_entropy(f @ f.t(), arange(f)), REFUSED),
    "active targets of other samples": (lambda f, y: F.mse_loss(f, f.flip(0)), REFUSED),
    "active targets broadcast": (lambda f, y: ((f[:, :1] - f[:, 1]) ** 2).mean(), REFUSED),
    "squared mean": (lambda f, y: f.mean(0).square().sum(), REFUSED),
    "differences of neighbours": (lambda f, y: (f[1:] - f[:-1]).square().sum(), REFUSED),
    "cumulated": (lambda f, y: f.cumsum(0).square().sum(), REFUSED),
    "largest of the batch": (lambda f, y: f.amax(), REFUSED),
}  # fmt: skip


class PerSample:
    """Terms of the loss of the full batch, one for every sample, and what they give."""

    def __init__(self, net, inputs, loss, y):
        self.params = dict(net.named_parameters())
        self.f = net(*inputs)
        self.terms, self.loss = loss(self.f, y)

    def _grads(self, value):
        found = torch.autograd.grad(value, list(self.params.values()), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params.values(), found, strict=True)]

    def grad(self):
        return dict(zip(self.params, self._grads(self.loss), strict=True))

    def grad_batch(self):
        return dict(zip(self.params, map(torch.stack, zip(*map(self._grads, self.terms), strict=True)), strict=True))

    def diag_ggn_exact(self):
        """diag(J^T H J), with H of the cross-entropy in closed form."""
        n, classes = self.f.shape
        out = [torch.zeros_like(p) for p in self.params.values()]
        for row in self.f:
            rows = [self._grads(v) for v in row]
            p = row.detach().softmax(0)
            h = (p.diag() - p.outer(p)) / n
            for j, total in enumerate(out):
                jacobian = torch.stack([r[j] for r in rows]).flatten(1)
                total += torch.einsum("cp,cd,dp->p", jacobian, h, jacobian).view_as(total)
        return dict(zip(self.params, out, strict=True))


def close(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=name: f"{k}: {m}")


def data(sizes):
    torch.manual_seed(0)
    n, d, c = sizes
    x = torch.randn(n, d, dtype=torch.float64)
    y = torch.randint(c, (n,))
    y[:2] = torch.tensor([1, 0])
    own = torch.tensor([2, 0, 3, 1, 4])[:n]
    edges = torch.tensor([[0, 1, 2, 3, 1, 2], [1, 2, 3, 0, 0, 0]])
    return x, own, edges, y


def meets(function, x):
    """Whether a sample's slice depends on another's, at any of a few values."""
    for seed in range(4):
        torch.manual_seed(seed)
        h = torch.autograd.functional.jacobian(function, torch.randn_like(x)).abs().amax((1, 3))
        if (h - h.diag().diag()).max() > 1e-12:
            return True
    return False


def model_of(run, sizes):
    torch.manual_seed(1)
    n, d, c = sizes
    act = lambda m, x, i, e: m.last(run(torch.tanh(m.first(x)), i, e))  # noqa: E731
    return Net(act, first=nn.Linear(d, d), last=nn.Linear(d, c)).double()


def cross_entropy(f, y):
    terms = F.cross_entropy(f, y, reduction="none") / len(y)
    return terms, terms.sum()


QUICK = {
    "messages by index_add", "messages by scatter_add", "rows by gather", "rows by indexing", "masked_scatter", "gather within",
    "positions by indexing", "in order", "in order for small batches only", "shifted by an index", "cumsum",
    "shift by padding", "transposed", "repeated and back", "strides", "column against row",
    "mean beside samples, no rule", "messages of messages", "positions from what is mixed",
}  # fmt: skip


def cases(table, quick):
    def param(name, sizes):
        slow = () if name in quick and sizes == EQUAL else pytest.mark.slow
        return pytest.param(name, sizes, id=f"{name}-{'equal' if sizes == EQUAL else 'unequal'}", marks=slow)

    return [param(name, sizes) for name in table for sizes in (EQUAL, UNEQUAL)]


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize(("name", "sizes"), cases(MODELS, QUICK))
def test_models(name, sizes):
    run, outcome = MODELS[name]
    outcome = outcome[sizes[0]] if isinstance(outcome, dict) else outcome
    x, own, edges, y = data(sizes)
    assert meets(lambda h: run(h, own, edges), x) == (outcome == REFUSED), "the table is wrong"
    net, inputs = model_of(run, sizes), (x, own, edges)
    expected = PerSample(net, inputs, cross_entropy, y)
    compiled = fxcurv.compile(
        net, F.cross_entropy, [BatchGrad(), BatchL2Grad(), DiagGGNExact()], batch_dim=(0, 0, None)
    )
    if outcome == RIGHT:
        for _ in range(2):
            result = compiled(inputs, y)
            close(result.grad, expected.grad())
            close(result.grad_batch, expected.grad_batch())
            close(result.batch_l2, {k: v.flatten(1).square().sum(1) for k, v in expected.grad_batch().items()})
            close(result.diag_ggn_exact, expected.diag_ggn_exact())
        return
    with pytest.raises(MixedSamplesError, match="(?s)op .*, so BatchGrad, BatchL2Grad"):
        compiled(inputs, y)
    if sizes == UNEQUAL:  # what is not refused is compared where a wrong axis would go unnoticed
        return
    plain = fxcurv.compile(net, F.cross_entropy, [], batch_dim=(0, 0, None))(inputs, y)
    close(plain.grad, expected.grad())
    try:
        whole = fxcurv.compile(net, F.cross_entropy, [DiagGGNExact()], batch_dim=(0, 0, None))(inputs, y)
    except FxcurvError:
        return
    close(whole.diag_ggn_exact, expected.diag_ggn_exact())


@pytest.mark.parametrize(("name", "sizes"), cases(LOSSES, {"log probabilities by targets", "ranks"}))
def test_losses(name, sizes):
    """Right is what each sample's output alone gives, at the targets that there are."""
    loss, outcome = LOSSES[name]
    x, _, _, y = data(sizes)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(sizes[1], 4), nn.Tanh(), nn.Linear(4, sizes[2])).double()

    def separately(f, y):
        """The loss with all outputs but one held still has this one's gradient."""
        n = len(f)
        alone = [torch.cat([f[:k].detach(), f[k : k + 1], f[k + 1 :].detach()]) for k in range(n)]
        return [loss(g, y) for g in alone], loss(f, y)

    def joint(f):
        """The mixed second derivatives of the loss in two samples' outputs."""
        return torch.autograd.functional.hessian(lambda g: loss(g, y), f)

    f = net(x).detach()
    n = len(f)
    h = joint(f).permute(0, 2, 1, 3)
    apart = all(h[i, j].abs().max() < 1e-12 for i in range(n) for j in range(n) if i != j)
    assert name == "largest of the batch" or apart == (outcome != REFUSED), "the table is wrong"
    expected = PerSample(net, (x,), separately, y)
    compiled = fxcurv.compile(net, loss, [BatchGrad(), BatchL2Grad()])
    if outcome == RIGHT:
        result = compiled(x, y)
        close(result.grad, expected.grad())
        close(result.grad_batch, expected.grad_batch())
    else:
        with pytest.raises(MixedSamplesError, match="BatchGrad"):
            compiled(x, y)
    close(fxcurv.compile(net, loss, [])(x, y).grad, expected.grad())


def test_no_number_says_nothing_of_samples():
    """A root of a negative number at whatever value is tried: not constant, and so no sum over samples."""
    op = torch.ops.aten.native_group_norm.default
    mean = lambda m, x: (x * m.w).mean(0).view(1, 4, 1)  # noqa: E731
    net = Net(
        lambda m, x: x * m.w + op(mean(m, x), None, None, 1, 4, 1, 2, -0.5)[0].view(4), w=nn.Parameter(torch.ones(4))
    )
    net, x = net.double(), torch.randn(3, 4, dtype=torch.float64) * 10
    with pytest.raises(UnsupportedOpError, match="it gives no numbers"):
        fxcurv.compile(net, nn.MSELoss(), [BatchGrad()])(x, x)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_images_resized(mode):
    """Indices that are computed from the images' sizes alone move no sample, though they are not affine in their position."""
    torch.manual_seed(0)
    net = Net(lambda m, x: F.interpolate(m.a(x), size=(3, 5), mode=mode), a=nn.Conv2d(1, 2, 2)).double()
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    y = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    found = fxcurv.compile(net, nn.MSELoss(), [BatchGrad()])(x, y).grad_batch
    for n in range(4):
        true = torch.autograd.grad(
            nn.functional.mse_loss(net(x)[n], y[n], reduction="sum") / y.numel(), list(net.parameters())
        )
        for (name, _), g in zip(net.named_parameters(), true, strict=True):
            torch.testing.assert_close(found[name][n], g)
