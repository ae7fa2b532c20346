"""Inner products and random projections of products that are not formed: values, as operators, in blocks, counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fxcurv.ir.noise import signs
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels import outer_gram, projections

gram, dots = outer_gram.outer_gram, outer_gram.outer_dots
project, rows_project = projections.outer_project, projections.rows_project


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def p_of(a, g):
    return torch.einsum("vnso,nsi->vnoi", g.double(), a.double())


# (V, N, S), (W, M, T), outputs, inputs: by rows, by positions
PAIRS = [
    ((2, 3, 4), (1, 5, 2), 3, 2),
    ((2, 3, 2), (3, 4, 1), 9, 8),
    ((1, 0, 2), (2, 3, 2), 3, 2),
    ((1, 1, 1), (1, 1, 1), 1, 1),
]


@pytest.mark.parametrize("block", [1, 50, 1 << 19])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_inner_products(dtype, block, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", block)
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for (v, n, s), (w, m, t), o, i in PAIRS:
        a, g = random(n, s, i, dtype=dtype), random(v, n, s, o, dtype=dtype)
        b, h, q = random(m, t, i, dtype=dtype), random(w, m, t, o, dtype=dtype), random(3, o, i, dtype=dtype)
        both, own, given = gram(a, g, b, h), gram(a, g), dots(a, g, q)
        assert both.dtype == own.dtype == given.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        torch.testing.assert_close(both.double(), torch.einsum("vnoi,wmoi->vnwm", p_of(a, g), p_of(b, h)), **close)
        torch.testing.assert_close(own.double(), torch.einsum("vnoi,wmoi->vnwm", p_of(a, g), p_of(a, g)), **close)
        torch.testing.assert_close(given.double(), torch.einsum("vnoi,qoi->vnq", p_of(a, g), q.double()), **close)


@pytest.mark.parametrize("block", [1, 50, 1 << 19])
@pytest.mark.parametrize("sizes, order", [([3, 4], [0, 1]), ([3, 4], [1, 0]), ([3, 2, 2], [1, 0, 2])])
def test_projections(block, sizes, order, monkeypatch):
    """Also where the parameter is the product transposed, and for 1 position and several; 70 columns are 3 words."""
    monkeypatch.setattr(cpu, "BLOCK", block)
    r = signs(torch.arange(12), 70, 5, torch.float64) / 70**0.5
    for s in (1, 3):
        a, g = random(2, s, 4), random(2, s, 3)
        p = torch.einsum("nso,nsi->noi", g, a).reshape(2, *sizes).permute(0, *(1 + d for d in order))
        torch.testing.assert_close(project(a, g, sizes, order, 70, 5), p.reshape(2, 12) @ r)
        torch.testing.assert_close(projections.project(p.reshape(2, 12), 70, 5), p.reshape(2, 12) @ r)
    index, g = torch.tensor([[0, 2, 2], [3, 0, 1]]), random(2, 3, 3)
    counted = g * (index != 3).unsqueeze(2)
    table = torch.stack([torch.zeros(4, 3).double().index_add(0, i, x) for i, x in zip(index, counted, strict=True)])
    torch.testing.assert_close(rows_project(index, g, 3, 70, 5), table.flatten(1) @ r)


def test_signs_are_independent():
    """Means, products of columns and of entries are those of fair coins; other keys give other signs."""
    r = signs(torch.arange(4096), 160, 123456789123, torch.float64)
    assert set(r.unique().tolist()) == {-1, 1}
    assert torch.equal(r[1000:1100, :50], signs(torch.arange(1000, 1100), 50, 123456789123, torch.float64))
    columns = r.t() @ r / 4096 - torch.eye(160)
    entries = r @ r.t() / 160 - torch.eye(4096)
    for t, count, n in ((r.mean(0), 160, 4096), (columns, 160 * 159, 4096), (entries, 4096 * 4095, 160)):
        assert float(t.abs().max()) < 7 / n**0.5  # of `count` normal numbers none is as large
        assert abs(float(t.square().sum()) * n / count - 1) < 0.4
    assert abs(float((r * signs(torch.arange(4096), 160, 123456789124, torch.float64)).mean())) < 0.01
    assert abs(float((r[:-1] * r[1:]).mean())) < 0.01 and abs(float((r[:, :-32] * r[:, 32:]).mean())) < 0.01


CALLS = {
    "by rows": (gram, (random(3, 4, 2), random(2, 3, 4, 3)), 2 * 3 * 2 * 24 + 2 * 36 * 6),
    "by positions": (gram, (random(3, 1, 8), random(2, 3, 1, 9)), 2 * 9 * (8 + 4 * 10)),
    "dots": (dots, (random(3, 2, 4), random(2, 3, 2, 5), random(7, 5, 4)), 2 * 6 * 20 * (2 + 7)),
    "project": (project, (random(3, 2, 4), random(3, 2, 5), [5, 4], [0, 1], 6, 1), 2 * 3 * 20 * (6 + 2)),
    "rows": (rows_project, (torch.zeros(3, 2).long(), random(3, 2, 5), -1, 6, 1), 2 * 3 * 2 * 5 * 6),
}


@pytest.mark.parametrize("name", CALLS)
def test_as_operators(name):
    op, args, operations = CALLS[name]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    with FlopCounterMode(display=False) as counter:
        op(*[t.to("meta") if isinstance(t, torch.Tensor) else t for t in args])
    assert counter.get_total_flops() == operations
