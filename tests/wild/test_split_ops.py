"""What `rules.split` says of an op, tried: on parts of a batch the op gives parts of what it gives on the whole."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcurv.contractions.contract import Contract, Spec
from fxcurv.contractions.factors import Arrange, Conv, Dense, Explicit, Gather
from fxcurv.ir.batch import Batch
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Alike, Replicate, Shard, samples_back, samples_first
from fxcurv.rules import split
from fxcurv.rules.split import Split

aten = torch.ops.aten
own = torch.ops.fxcurv
N, CUTS = 7, (4, 3)
S0, S1, S2, R, P = Shard(0), Shard(1), Shard(2), REPLICATE, PARTIAL


def t(place, *shape, integer=0):
    """An argument: (value, placement), drawn anew at each call."""
    value = torch.randint(integer, shape) if integer else torch.randn(shape, dtype=torch.float64)
    return SimpleNamespace(value=value, place=place)


def parts_of(arg) -> list[Tensor]:
    if isinstance(arg.place, Shard):
        rows = samples_first(arg.value, arg.place)
        return [samples_back(r.contiguous(), arg.place) for r in rows.split(CUTS)]
    if arg.place == P:
        first = torch.randn_like(arg.value)
        return [first, arg.value - first]
    return [arg.value] * len(CUTS)


def check(op, args, expected=None):
    """Run `op` on the whole and, as `Split` has it, on parts; gives the placement."""
    leaves, spec = pytree.tree_flatten(args)
    graph, split_ = fx.Graph(), Split(SimpleNamespace(batch=Batch(size=N), rules={}))
    nodes = {}
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, SimpleNamespace):
            zeros = not leaf.value.any() and leaf.value.numel()
            nodes[k] = graph.call_function(aten.zeros.default) if zeros else graph.placeholder(f"x{k}")
            nodes[k].meta = {"val": leaf.value}
            split_.across[nodes[k]] = leaf.place
    node = graph.call_function(op, pytree.tree_unflatten([nodes.get(k, a) for k, a in enumerate(leaves)], spec))
    whole = op(*pytree.tree_unflatten([a.value if k in nodes else a for k, a in enumerate(leaves)], spec))
    node.meta = {"val": whole}
    lies = split_.visit(node)
    assert expected is None or lies.place == expected, lies.place
    if lies.place == MIXED:
        return lies
    outs = []
    cut = {k: parts_of(leaves[k]) for k in nodes}
    for part in range(len(CUTS)):
        # no other size has N in it
        sizes = [a // N * CUTS[part] if type(a) is int and a % N == 0 else a for a in leaves]
        mine = [cut[k][part] if k in nodes else a for k, a in enumerate(sizes)]
        given = [leaves[k].value if nodes.get(k) in lies.complete else a for k, a in enumerate(mine)]
        outs.append(op(*pytree.tree_unflatten(given, spec)))
    several = isinstance(whole, tuple | list)
    places = lies.place if several else [lies.place]
    for k, place in enumerate(places):
        values = [o[k] if several else o for o in outs]
        of_whole = whole[k] if several else whole
        if of_whole is not None and place != MIXED:
            torch.testing.assert_close(joined(place, values), of_whole, rtol=1e-10, atol=1e-12)
    return lies


def joined(place, values):
    if place == P:
        return sum(values)
    if isinstance(place, Replicate):
        for v in values[1:]:
            torch.testing.assert_close(v, values[0], rtol=0, atol=0)
        return values[0]
    return samples_back(torch.cat([samples_first(v, place) for v in values]), place)


def index(shape, high):
    return t(S0, *shape, integer=high)


def pooled():
    x = t(S0, N, 2, 4, 4)
    y, i = aten.max_pool2d_with_indices.default(x.value, [2, 2], [2, 2])
    return x, t(S0, *y.shape), SimpleNamespace(value=i, place=S0)


def pool_back():
    x, g, i = pooled()
    return (g, x, [2, 2], [2, 2], [0, 0], [1, 1], False, i)


def pool_columns():
    x, g, i = pooled()
    columns = SimpleNamespace(value=torch.stack([g.value, 2 * g.value]), place=S1)
    return (columns, x, i, [2, 2], [2, 2], [0, 0], [1, 1], False)


def zeros(*shape):
    return SimpleNamespace(value=torch.zeros(shape, dtype=torch.float64), place=R)


CONV = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
CASES = {
    "softmax": (aten._softmax.default, lambda: (t(S0, N, 3), 1, False), S0),
    "softmax over samples": (aten._softmax.default, lambda: (t(S1, 3, N), 1, False), MIXED),
    "softmax of a sum": (aten._softmax.default, lambda: (t(P, 2, 3), 1, False), R),
    "softmax backward": (
        aten._log_softmax_backward_data.default, lambda: (t(S1, 2, N, 3), t(S1, 2, N, 3), -1, torch.float64), S1),
    "cumsum": (aten.cumsum.default, lambda: (t(S0, N, 3), 1), S0),
    "spectrum": (aten._fft_r2c.default, lambda: (t(S0, N, 5), [1], 0, True), S0),
    "spectrum over samples": (aten._fft_r2c.default, lambda: (t(S1, 5, N), [1], 0, True), MIXED),
    "a spectrum of the data": (aten.fft_rfft.default, lambda: (t(S0, N, 5), None, 1, None), S0),
    "a spectrum of images": (aten.fft_rfft2.default, lambda: (t(S0, N, 5, 4), None, [-2, -1], None), S0),
    "pairs": (aten.view_as_complex.default, lambda: (t(S1, 3, N, 2),), S1),
    "searched": (aten.searchsorted.Tensor, lambda: (t(S0, N, 4), t(S0, N, 2)), S0),
    "searched over samples": (aten.searchsorted.Tensor, lambda: (t(S1, 3, N), t(S1, 3, N)), MIXED),
    "gather": (aten.gather.default, lambda: (t(S0, N, 3), 1, index((N, 2), 3)), S0),
    "scatter": (aten.scatter_add.default, lambda: (t(S0, N, 3), 1, index((N, 2), 3), t(S0, N, 2)), S0),
    "amax": (aten.amax.default, lambda: (t(S1, 3, N), [0]), S0),
    "amax over samples": (aten.amax.default, lambda: (t(S1, 3, N), [1]), MIXED),
    "any": (aten.any.dim, lambda: (t(S0, N, 3, integer=2), 1), S0),
    "logsumexp": (aten.logsumexp.default, lambda: (t(S0, N, 3), [1], True), S0),
    "sum over samples": (aten.sum.dim_IntList, lambda: (t(S0, N, 3), [0]), P),
    "sum of a part": (aten.sum.dim_IntList, lambda: (t(P, 4, 3), [0]), P),
    "sum over columns": (aten.sum.dim_IntList, lambda: (t(S1, 2, N, 3), [0]), S0),
    "sum": (aten.add.Tensor, lambda: (t(P, 3), t(P, 3)), P),
    "sum with what all have": (aten.add.Tensor, lambda: (t(P, 3), t(R, 3)), R),
    "sum with a number": (aten.add.Tensor, lambda: (t(P, 3), 1.0), R),
    "product": (aten.mul.Tensor, lambda: (t(P, 3), t(R, 3)), P),
    "product with samples": (aten.mul.Tensor, lambda: (t(P, 3), t(S0, N, 3)), S0),
    "product of sums": (aten.mul.Tensor, lambda: (t(P, 3), t(P, 3)), R),
    "quotient": (aten.div.Tensor, lambda: (t(P, 3), t(R, 3)), P),
    "divisor": (aten.div.Tensor, lambda: (t(R, 3), t(P, 3)), R),
    "square": (aten.pow.Tensor_Scalar, lambda: (t(P, 3), 2), R),
    "aligned": (aten.mul.Tensor, lambda: (t(S1, 2, N, 3), t(S0, N, 3)), S1),
    "not aligned": (aten.mul.Tensor, lambda: (t(S0, N, N), t(S1, N, N)), MIXED),
    "cat of sums": (aten.cat.default, lambda: ([t(P, 3), t(P, 2)],), P),
    "cat with a constant": (aten.cat.default, lambda: ([t(P, 3), t(R, 2)],), R),
    "columns joined": (aten.cat.default, lambda: ([t(S1, 2, N, 3), t(S1, 1, N, 3)],), S1),
    "columns folded": (aten.reshape.default, lambda: (t(S1, 2, N, 3), [2 * N, 3]), None),
    "gram": (aten.mm.default, lambda: (t(S1, 3, N), t(S0, N, 4)), P),
    "gram of folded columns": (aten.mm.default, lambda: (t(Shard(1, 2), 3, 2 * N), t(Shard(0, 2), 2 * N, 4)), P),
    "fold in two ways": (aten.mm.default, lambda: (t(Shard(1, 2), 3, 2 * N), t(Shard(0, 1, 2), 2 * N, 4)), MIXED),
    "weight times sum": (aten.mm.default, lambda: (t(R, 3, 4), t(P, 4, 2)), P),
    "sum times sum": (aten.mm.default, lambda: (t(P, 3, 4), t(P, 4, 2)), R),
    "linear": (aten.linear.default, lambda: (t(P, 2, 4), t(R, 3, 4)), P),
    "linear with a bias": (aten.linear.default, lambda: (t(P, 2, 4), t(R, 3, 4), t(R, 3)), R),
    "convolution of folded columns": (
        aten.convolution.default, lambda: (t(Shard(0, 2), 2 * N, 2, 4, 4), t(R, 3, 2, 3, 3), t(R, 3), *CONV), Shard(0, 2)),
    "convolution backward": (
        aten.convolution_backward.default,
        lambda: (t(S0, N, 3, 4, 4), t(S0, N, 2, 4, 4), t(R, 3, 2, 3, 3), [3], *CONV, [True, True, True]), [S0, P, P]),
    "pooling backward": (aten.max_pool2d_with_indices_backward.default, pool_back, S0),
    "pooled columns": (own.max_pool_columns.default, pool_columns, S1),
    "unfold": (aten.unfold.default, lambda: (t(S0, N, 5), 1, 2, 1), S0),
    "slice backward": (aten.slice_backward.default, lambda: (t(S0, N, 2), [N, 5], 1, 1, 3, 1), S0),
    "select backward": (aten.select_backward.default, lambda: (t(S0, N, 3), [2, N, 3], 0, 1), S1),
    "select backward behind": (aten.select_backward.default, lambda: (t(S0, N, 3), [N, 2, 3], 1, 1), S0),
    "nll": (aten.nll_loss_forward.default, lambda: (t(S0, N, 3), index((N,), 3), None, 2, -100), [P, P]),
    "nll each": (aten.nll_loss_forward.default, lambda: (t(S0, N, 3), index((N,), 3), t(R, 3), 0, 1), [S0, P]),
    "nll backward": (
        aten.nll_loss_backward.default,
        lambda: (t(R), t(S0, N, 3), index((N,), 3), None, 1, -100, t(P)), S0),
    "squares": (aten.mse_loss.default, lambda: (t(S0, N, 3), t(S0, N, 3), 2), P),
    "squares backward": (aten.mse_loss_backward.default, lambda: (t(P), t(S0, N, 3), t(S0, N, 3), 2), S0),
    "lookup backward": (aten.embedding_dense_backward.default, lambda: (t(S0, N, 2, 4), index((N, 2), 5), 5, -1, False), P),
    "rows added": (aten.index_add.default, lambda: (zeros(5, 4), 0, index((N,), 5), t(S0, N, 4)), P),
    "rows added to others": (aten.index_add.default, lambda: (t(R, 5, 4), 0, index((N,), 5), t(S0, N, 4)), MIXED),
    "rows of each sample": (aten.index_add.default, lambda: (t(R, 5, 4), 0, t(R, 3, integer=5), t(R, 3, 4)), R),
    "weights of classes": (aten.index.Tensor, lambda: (t(R, 5), [index((N,), 5)]), S0),
    "columns taken": (aten.index.Tensor, lambda: (t(R, 4, 5), [None, index((N, 2), 5)]), S1),
    "of every sample": (aten.index.Tensor, lambda: (t(S0, N, 5), [None, t(R, 3, integer=5)]), S0),
    "by sample": (aten.index.Tensor, lambda: (t(S0, N, 5), [index((N,), N), index((N,), 5)]), MIXED),
    "select by sample": (aten.index_select.default, lambda: (t(R, 4, 5), 1, index((N,), 5)), S1),
    "select of every sample": (aten.index_select.default, lambda: (t(S0, N, 5), 1, t(R, 3, integer=5)), S0),
    "unbind": (aten.unbind.int, lambda: (t(S1, 2, N, 3), 0), [S0, S0]),
    "unbind behind": (aten.unbind.int, lambda: (t(S0, N, 2), 1), [S0, S0]),
    "unbind a sum": (aten.unbind.int, lambda: (t(P, 2, 3), 0), [P, P]),
    "split": (aten.split_with_sizes.default, lambda: (t(S1, 3, N), [1, 2], 0), [S1, S1]),
    "stack": (aten.stack.default, lambda: ([t(S0, N, 3), t(S0, N, 3)], 0), S1),
    "stack behind": (aten.stack.default, lambda: ([t(S1, 3, N), t(S1, 3, N)], 2), S1),
    "one hot of samples": (aten.eye.m, lambda: (N, 3), MIXED),
    "noise of a weight": (aten.bernoulli.p, lambda: (t(R, 3), 0.5), MIXED),
    "noise of samples": (aten.rand.default, lambda: ([N, 3],), MIXED),
    "repeated": (aten.expand.default, lambda: (t(R, 3), [N, 3]), Alike(0)),
    "pairs of samples": (aten.expand.default, lambda: (t(S1, 1, N), [N, N]), MIXED),
    "with a buffer": (aten.log_sigmoid_forward.default, lambda: (t(S0, N, 3),), None),
    "filled": (aten.fill.Scalar, lambda: (t(S0, N, 3), 2.0), Alike(0)),
    "syrk": (own.syrk.default, lambda: (t(S1, 40, N),), P),
    "eigenvalues": (aten._linalg_eigh.default, lambda: (t(S0, N, 3, 3), "L", False), [S0, S0]),
    "layer norm": (aten.layer_norm.default, lambda: (t(S0, N, 3), [3], t(R, 3), t(R, 3)), S0),
    "layer norm backward": (
        aten.native_layer_norm_backward.default,
        lambda: (t(S0, N, 3), t(S0, N, 3), [3], t(S0, N, 1), t(S0, N, 1), t(R, 3), t(R, 3), [True, True, True]), [S0, P, P]),
    "attention": (
        aten._scaled_dot_product_flash_attention_for_cpu.default, lambda: tuple(t(S0, N, 2, 3, 4) for _ in range(3)), [S0, S0]),
    "attention of heads": (
        aten._scaled_dot_product_flash_attention_for_cpu.default, lambda: tuple(t(S1, 2, N, 3, 4) for _ in range(3)), [S1, S1]),
    "attention to what all parts have": (
        aten._scaled_dot_product_flash_attention_for_cpu.default, lambda: (t(S2, 2, 1, N, 4), t(R, 2, 1, 3, 4), t(R, 2, 1, 3, 4)),
        [MIXED, MIXED]),
    "attention backward": (
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        lambda: (*(t(S0, N, 2, 3, 4) for _ in range(5)), t(S0, N, 2, 3), 0.0, True), [S0, S0, S0]),
    "zeros": (aten.zeros_like.default, lambda: (t(P, 3),), R),
    "where": (aten.where.self, lambda: (t(R, 3, integer=2), t(P, 3), t(R, 3)), R),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parts_give_parts(name):
    op, make, expected = CASES[name]
    torch.manual_seed(0)
    args = make()
    if name == "where":
        args[0].value = args[0].value.bool()
    check(op, args, expected)


def dense():
    return Dense(t(S0, N, 2, 1, 3), t(S1, 2, N, 2, 1, 4), Arrange((4, 3), (0, 1), (4, 3)))


def conv():
    window = ((3, 3), (1, 1), (1, 1), (1, 1), 1, False, (0, 0), (3, 2, 3, 3))
    return Conv(t(S0, N, 2, 4, 4), t(S1, 2, N, 3, 4, 4), S0, *window)


def gather():
    return Gather(index((N, 2), 5), t(S1, 2, N, 2, 4), 5, -1)


def jacobian():
    return Explicit(t(S1, 2, N, 3))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduce", ["", "v", "n", "vn", "vp", "vnp"])
@pytest.mark.parametrize("factor", [dense, conv, gather, jacobian])
def test_a_contraction_places_itself(factor, reduce, weighted):
    torch.manual_seed(0)
    target, args = Contract.of(Spec(2, reduce), [factor()], t(S1, 2, N) if weighted else None)
    expected = PARTIAL if "n" in reduce else Shard(0 if "v" in reduce else 1)
    check(target, tuple(args), expected)


def test_samples_of_another_axis_are_mixed():
    """A factor whose samples are not where contractions look for them."""
    target, args = Contract.of(Spec(2, "vn"), [Explicit(t(S0, N, N, 3))], None)
    assert check(target, tuple(args)).place == MIXED


def test_entries_added_within_a_sample_stay_with_it():
    """Where the index is every sample's; a sum that is made anew has the size of a part."""
    outs = [torch.empty(N, 5)]
    for index_at, expected in ((R, S0), (S0, MIXED)):
        sites = [
            SimpleNamespace(place=place, shape=shape) for place, shape in ((R, (N, 5)), (index_at, (N,)), (S0, (N, N)))
        ]
        assert split.PLACES[aten.index_add.default](sites, (None, 1, None, None), outs) == expected


def test_every_op_of_the_table_is_tried():
    """What is not in `CASES` has an op of the same function there."""
    tried = {op for op, *_ in CASES.values()}
    functions = {split.PLACES[op] for op in tried if op in split.PLACES}
    same = {getattr(f, "__qualname__", "") for f in functions}
    untried = {str(op) for op, f in split.PLACES.items() if op not in tried and f.__qualname__ not in same}
    assert untried <= {"fxcurv.syrk_conv.default"}  # through KFAC of a large image, in test_split_batch
