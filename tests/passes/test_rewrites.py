"""Rewrites of the graph: a model becomes another, and every quantity stays what it is by definition."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.ir.emit import emit
from fxcurv.passes.simplify import simplify

aten = torch.ops.aten
CLASSES = 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def some(names: Iterable[str], usual: Collection[str]) -> list[Any]:
    """Cases, but for the usual ones slow."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


def images(*shape: int) -> tuple[Tensor, Tensor]:
    """Normal images and labels."""
    return torch.randn(shape, dtype=torch.float64), torch.randint(CLASSES, shape[:1])


def head(*body: nn.Module) -> nn.Module:
    """The body and a linear layer with a class per output."""
    return nn.Sequential(*body, nn.Flatten(), nn.LazyLinear(CLASSES)).double()


def lowered(model, extensions, x, y=None, **options):
    loss = F.cross_entropy if y is not None else lambda f: f.square().mean()
    return fxcurv.compile(model, loss, extensions, **options).lower(*((x,) if y is None else (x, y)))


def calls(program, op) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target is op]


def forward(program) -> list[tuple]:
    """The model's ops in order, with arguments that are no tensors, but for copies."""
    skip = {operator.getitem, aten.clone.default, aten.sym_size.int}
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target not in skip]
    own = [n for n in nodes if not n.meta.get("origin") or not n.meta["origin"].get("in_loss")]
    own = [n for n in own if n.meta.get("origin", {"stage": "forward"})["stage"] == "forward"]
    return [
        (str(n.target), [a for a in n.args if not isinstance(a, fx.Node) and a != 0 and "sym" not in str(a)])
        for n in own
    ]


def check(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """Gradient, individual gradients and the Gauss-Newton diagonal beside the oracle's; returns the compiled object."""
    extensions = [BatchGrad(), DiagGGNExact()]
    compiled = fxcurv.compile(model, F.cross_entropy, extensions)
    agree(compiled(x, y), Oracle(model, F.cross_entropy, x, y, kind="ce"), extensions)
    return compiled


def agree(result: Any, oracle: Oracle, extensions: list) -> None:
    fields = ["grad", *(e.savefield for e in extensions)]
    for field in fields:
        for name, expected in getattr(oracle, field)().items():
            actual = getattr(result, field)[name]
            torch.testing.assert_close(
                actual, expected, rtol=1e-8, atol=1e-11, msg=lambda m, f=field, n=name: f"{f} {n}: {m}"
            )


# ---- pooling before the activation ------------------------------


def conv() -> nn.Module:
    return nn.Conv2d(2, 3, 3)


PAD = nn.ConstantPad2d
# name -> (a model's modules, those that it becomes); images of side 9 give the pool 7 x 7
MOVES: dict[str, tuple[list[nn.Module], list[nn.Module]]] = {
    "relu": ([nn.ReLU(), nn.MaxPool2d(2)], [nn.MaxPool2d(2), nn.ReLU()]),
    "relu6": ([nn.ReLU6(), nn.MaxPool2d(3, 2)], [nn.MaxPool2d(3, 2), nn.ReLU6()]),
    "hardtanh": ([nn.Hardtanh(-0.5, 0.75), nn.MaxPool2d(3, 2)], [nn.MaxPool2d(3, 2), nn.Hardtanh(-0.5, 0.75)]),
    "padded pool": ([nn.ReLU(), nn.MaxPool2d(3, 2, 1)], [nn.MaxPool2d(3, 2, 1), nn.ReLU()]),
    "ceil": ([nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)], [nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU()]),
    "dilated": ([nn.ReLU(), nn.MaxPool2d(2, 1, dilation=2)], [nn.MaxPool2d(2, 1, dilation=2), nn.ReLU()]),
    "twice": ([nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2, 1)], [nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.ReLU()]),
    # zeros around what is not negative are no different from nothing around it
    "pad joined": ([nn.ReLU(), PAD(1, 0), nn.MaxPool2d(3, 2)], [nn.MaxPool2d(3, 2, 1), nn.ReLU()]),
    "pad of rows joined": ([nn.ReLU(), PAD((0, 0, 1, 1), 0), nn.MaxPool2d(3)], [nn.MaxPool2d(3, padding=(1, 0)), nn.ReLU()]),
    "pad at the end joined": (
        [nn.ReLU6(), PAD((0, 1, 0, 1), 0), nn.MaxPool2d(2)], [nn.MaxPool2d(2, ceil_mode=True), nn.ReLU6()]
    ),
    # what the pool's own padding cannot say stays an op, also before the activation
    "wide pad": ([nn.ReLU(), PAD(2, 0), nn.MaxPool2d(3, 2)], [PAD(2, 0), nn.MaxPool2d(3, 2), nn.ReLU()]),
    "uneven pad": ([nn.ReLU(), PAD((1, 0, 0, 1), 0), nn.MaxPool2d(2)], [PAD((1, 0, 0, 1), 0), nn.MaxPool2d(2), nn.ReLU()]),
    "pad of a padded pool": (
        [nn.ReLU(), PAD(1, 0), nn.MaxPool2d(3, 2, 1)], [PAD(1, 0), nn.MaxPool2d(3, 2, 1), nn.ReLU()]
    ),
    "pad of a dilated pool": (
        [nn.ReLU(), PAD(1, 0), nn.MaxPool2d(2, dilation=3)], [PAD(1, 0), nn.MaxPool2d(2, dilation=3), nn.ReLU()]
    ),
    "pad at the end, more windows": (
        [nn.ReLU(), PAD((0, 2, 0, 2), 0), nn.MaxPool2d(2, 1)], [PAD((0, 2, 0, 2), 0), nn.MaxPool2d(2, 1), nn.ReLU()]
    ),
    "crop": ([nn.ReLU(), PAD(-1, 0), nn.MaxPool2d(2)], [PAD(-1, 0), nn.MaxPool2d(2), nn.ReLU()]),
    "pad of hardtanh": (
        [nn.Hardtanh(), PAD(1, 0), nn.MaxPool2d(3, 2)], [PAD(1, 0), nn.MaxPool2d(3, 2), nn.Hardtanh()]
    ),
}  # fmt: skip

STAY: dict[str, list[nn.Module]] = {
    "leaky": [nn.LeakyReLU(), nn.MaxPool2d(2)],
    "tanh": [nn.Tanh(), nn.MaxPool2d(2)],
    "hardtanh above zero, padded": [nn.Hardtanh(0.1, 1.0), PAD(1, 0), nn.MaxPool2d(2)],
    "pad of ones": [nn.ReLU(), PAD(1, 1.0), nn.MaxPool2d(2)],
    "average": [nn.ReLU(), nn.AvgPool2d(2)],
}


USUAL = ["relu", "hardtanh", "pad joined", "pad at the end joined", "pad at the end, more windows"]


@pytest.mark.parametrize("name", some(MOVES, USUAL))
def test_pooling_moves_before_the_activation(name):
    before, after = MOVES[name]
    x, y = images(4, 2, 9, 9)
    model = head(conv(), *before)
    model(x)
    becomes = head(conv(), *after)
    becomes(x)
    found = forward(lowered(model, [], x, y))
    assert found == forward(lowered(becomes, [], x, y))
    names = [op.split(".")[1] for op, _ in found]
    activation = next(n for n in names if n in ("relu", "hardtanh", "relu6"))
    assert names.index("max_pool2d_with_indices") < names.index(activation)


@pytest.mark.parametrize("name", some(STAY, ["leaky"]))
def test_pooling_stays(name):
    x, y = images(4, 2, 9, 9)
    model = head(conv(), *STAY[name])
    model(x)
    names = [op.split(".")[1] for op, _ in forward(lowered(model, [], x, y))]
    pool = next(n for n in names if "pool" in n)
    assert names.index(pool) > 1 and names[1] != pool
    check(model, x, y)


class Twice(nn.Module):
    """The activation is read by the pool and by another."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = conv(), nn.Linear(27 + 3, CLASSES)

    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.last(torch.cat([F.max_pool2d(h, 2).flatten(1), h.mean((2, 3))], 1))


class Indices(nn.Module):
    """The places of the maxima are used, which the activation may move."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = conv(), nn.Linear(27, CLASSES)

    def forward(self, x):
        y, index = F.max_pool2d(torch.relu(self.conv(x)), 2, return_indices=True)
        return self.last((y * (index % 2)).flatten(1))


@pytest.mark.parametrize("make", [Twice, Indices])
def test_pooling_stays_where_more_is_read(make):
    x, y = images(4, 2, 9, 9)
    model = make().double()
    names = [op.split(".")[1] for op, _ in forward(lowered(model, [], x, y))]
    assert names.index("relu") < names.index("max_pool2d_with_indices")
    check(model, x, y)


class Shows(nn.Module):
    """The activation is an output beside the prediction."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = conv(), nn.Linear(27, CLASSES)

    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.last(F.max_pool2d(h, 2).flatten(1)), h


class First(nn.Module):
    """A model's first output."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return self.of(x)[0]


def test_an_activation_that_is_an_output_stays_right():
    x, y = images(3, 2, 9, 9)
    model = Shows().double()
    result = fxcurv.compile(model, lambda out, y: F.cross_entropy(out[0], y), [BatchGrad()])(x, y)
    for actual, expected in zip(result.output, model(x), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()
    oracle = Oracle(First(model), F.cross_entropy, x, y, kind="ce")
    for name, expected in oracle.grad_batch().items():
        torch.testing.assert_close(result.grad_batch[name.removeprefix("of.")], expected)


@pytest.mark.parametrize("name", some(MOVES, USUAL[1:4]))
def test_values_and_ties(name):
    """Equal values, and many at a kink: images of few whole numbers through weights of few whole numbers.

    Where two entries are equal before the activation, the pool takes the first of them on either side. Where they are equal
    only after it, the activation is flat.
    """
    x, y = images(4, 2, 9, 9)
    model = head(conv(), *MOVES[name][0])
    model(x)
    compiled = check(model, x, y)
    x = torch.randint(-1, 2, (4, 2, 9, 9)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-1, 2, model[0].weight.shape))
        model[0].bias.zero_()
        if "hardtanh" in name:
            model[0].weight.mul_(0.25)  # within the bounds, at them and beyond
    values = model[0](x)
    assert (values == 0).double().mean() > 0.05
    agree(compiled(x, y), Oracle(model, F.cross_entropy, x, y, kind="ce"), [BatchGrad(), DiagGGNExact()])


# ---- layout ------------------------------


class Reads(nn.Module):
    """What `read` makes of a convolution's output, as prediction."""

    def __init__(self, read: Callable[[Tensor], Tensor], channels: int = 4):
        super().__init__()
        self.conv, self.scale, self.read = nn.Conv2d(2, channels, 3, padding=1), nn.Parameter(torch.rand(1)), read
        self.last = nn.LazyLinear(CLASSES)

    def forward(self, x):
        return self.last(self.read(self.conv(x) * self.scale).flatten(1))


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda h: h.reshape(h.shape[0], 2, -1).tanh().sum(2),
    "flatten": lambda h: h.flatten(2).softmax(2)[:, :, :2],
    "reshape across channels": lambda h: h.reshape(h.shape[0], 6, 6, 4).permute(0, 3, 1, 2).amax((2, 3)),
    "permute": lambda h: h.permute(0, 2, 3, 1).reshape(h.shape[0], -1)[:, :7].sin(),
    "cumsum": lambda h: h.cumsum(1).cumsum(3)[:, :, 2, 2],
    "pixel shuffle": lambda h: F.pixel_shuffle(h, 2)[:, :, ::5, 3],
    "scrambled pool": lambda h: F.max_pool2d(h.reshape(h.shape[0], 6, 6, 4).permute(0, 3, 1, 2).relu(), 2),
    "transposed pool": lambda h: F.max_pool2d(h.transpose(2, 3), 2, 1).flatten(2)[:, :, 3:9],
    "matmul": lambda h: (h @ h.mT).diagonal(dim1=2, dim2=3),
    "sum with itself moved": lambda h: (h + h.transpose(2, 3)).relu().reshape(h.shape[0], -1)[:, ::9],
    "roll and flip": lambda h: (h.roll(1, 2) * h.flip(3)).flatten(1)[:, ::5],
    "interpolation": lambda h: F.interpolate(h, scale_factor=0.5, mode="bilinear", align_corners=False),
    "group norm": lambda h: F.group_norm(h, 2).reshape(h.shape[0], -1)[:, ::7],
    "upsampled": lambda h: F.interpolate(h, scale_factor=2).reshape(h.shape[0], -1)[:, ::31],
    "adaptive": lambda h: F.adaptive_max_pool2d(h, 2),
    "unfold": lambda h: F.unfold(h, 2, stride=3)[:, ::3],
}


@pytest.mark.parametrize("given", some(["contiguous", "channels last"], ["contiguous"]))
@pytest.mark.parametrize("name", some(READS, ["permute", "pixel shuffle"]))
def test_what_reads_a_convolution_reads_its_values(name, given):
    x, y = images(3, 2, 6, 6)
    model = Reads(READS[name]).double()
    model(x)
    x = x.contiguous(memory_format=torch.channels_last) if given == "channels last" else x
    check(model, x, y)


def test_results_are_laid_out_as_parameters_are():
    x, y = images(3, 2, 9, 9)
    model = head(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, groups=1), nn.ReLU())
    model(x)
    extensions = [SumGradSquared(), Variance(), DiagGGNExact(), DiagGGNMC(), BatchDiagGGNExact()]
    result = fxcurv.compile(model, F.cross_entropy, extensions)(x, y)
    for name, p in model.named_parameters():
        assert result.grad[name].stride() == p.stride()
        for field in (e.savefield for e in extensions):
            value = getattr(result, field)[name]
            assert (value[0] if value.ndim > p.ndim else value).stride() == p.stride(), (field, name)


def test_outputs_are_laid_out_as_the_models():
    """Of a fully convolutional model, contiguous images give a contiguous output."""
    model = nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(3, CLASSES, 3)).double()
    x, y = torch.randn(2, 2, 7, 7).double(), torch.randint(CLASSES, (2, 3, 3))
    compiled = check(model, x, y)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(compiled(given, y).output, model(given))
    assert compiled(x, y).output.stride() == model(x).stride() == (27, 9, 3, 1)


def test_the_layout_takes_batches_of_any_size():
    model = head(conv(), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(3, 4, 2), nn.Sigmoid())
    x, y = images(5, 2, 9, 9)
    model(x)
    compiled = check(model, x[:3], y[:3])
    for n in (5, 2):
        given = x[:n]
        agree(
            compiled(given, y[:n]),
            Oracle(model, F.cross_entropy, given, y[:n], kind="ce"),
            [BatchGrad(), DiagGGNExact()],
        )


def test_a_convolution_reads_channels_last_once():
    """Two convolutions of one input share its copy; those that follow need none."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.last = conv(), conv(), nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.last(self.c(torch.relu(self.a(x)) + torch.sigmoid(self.b(x))).mean((2, 3)))

    x, y = images(3, 2, 7, 7)
    model = Two().double()
    program = lowered(model, [], x, y)
    clones = [n for n in calls(program, aten.clone.default) if n.kwargs.get("memory_format") == torch.channels_last]
    copies = [n for n in clones if n.meta["origin"]["stage"] == "forward"]
    assert [n.args[0].name for n in copies] == [next(i.name for i in program.graph.nodes if "inputs" in i.name)]
    check(model, x, y)


# ---- sums over positions before pooling's transpose ------------------------------


def pooled_net() -> nn.Module:
    return head(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.MaxPool2d(2, 1, ceil_mode=True), nn.ReLU())


def transposes(program) -> list[fx.Node]:
    ops = (aten.max_pool2d_with_indices_backward.default, torch.ops.fxcurv.max_pool_columns.default)
    return [n for op in ops for n in calls(program, op)]


def test_a_bias_before_pooling():
    """Frozen weights leave the sums alone: nothing is spread."""
    x, y = images(4, 2, 9, 9)
    model = pooled_net()
    model(x)
    model[0].weight.requires_grad_(False)
    first = lowered(model, [BatchGrad(), DiagGGNExact()], x, y)
    assert not [n for n in transposes(first) if n.meta["origin"]["module"] == "2"]
    check(model, x, y)


def test_factors_of_a_convolution_before_pooling():
    """KFLR's B under the default `blocks` is of sums over positions: the first layer's cotangents are not spread for it."""
    x, y = images(4, 2, 9, 9)
    model = pooled_net()
    model(x)
    model.requires_grad_(False)
    model[0].requires_grad_(True)
    gradient = len([n for n in transposes(lowered(model, [], x, y)) if n.meta["origin"]["module"] == "2"])
    program = lowered(model, [KFLR()], x, y)
    assert len([n for n in transposes(program) if n.meta["origin"]["module"] == "2"]) == gradient


class Scrambled(nn.Module):
    """Between the bias and the pool, rows and channels change places by a view that is none of the other layout."""

    def __init__(self):
        super().__init__()
        self.bias, self.last = nn.Parameter(torch.randn(4, 1, 1)), nn.Linear(4 * 4, CLASSES)

    def forward(self, x):
        h = (x + self.bias).reshape(x.shape[0], 4, 4, 4).permute(0, 3, 1, 2)
        return self.last(F.max_pool2d(h, 2).flatten(1))


def test_a_sum_over_other_positions_is_not_taken_before():
    x, y = images(3, 4, 4, 4)
    check(Scrambled().double(), x, y)


@pytest.mark.parametrize("axes", some(["2, 3", "1, 2", "1, 3"], ["1, 2"]))
def test_sums_of_transposed_images_before_pooling(axes):
    read = lambda h: h.transpose(*map(int, axes.split(",")))  # noqa: E731

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.last = nn.Parameter(torch.randn(4, 1, 1)), nn.Linear(16, CLASSES)

        def forward(self, x):
            return self.last(F.max_pool2d(read(x + self.bias), 2).flatten(1))

    x, y = images(3, 4, 4, 4)
    check(Model().double(), x, y)


# ---- simplify: columns of a view are a view of the columns ------------------------------


def test_columns_of_a_view_are_a_view_of_the_columns():
    """Slices of a stack before and after views of it become the same slices."""
    x, y = images(5, 4)
    program = lowered(nn.Linear(4, 3).double(), [], x, y)
    stack = next(n for n in program.graph.nodes if n.op == "placeholder" and n.meta["val"].ndim == 2)

    def fn(s):
        s = s.unsqueeze(1) * 2
        whole = s.view(s.shape[0], 2, -1).unsqueeze(3)
        return whole[1:2].sum() + s[1:2].sum() + whole.sum()

    origin = {"stage": "select", "op": "test"}
    last = next(n for n in program.graph.nodes if n.op == "output")
    total = emit(program, fn, stack, origin=origin, before=last)
    program.extras["total"] = total
    simplify(program)
    slices = [n for n in program.graph.nodes if n.target is aten.slice.Tensor and n.args[1] == 0]
    assert len(slices) == 1 and slices[0].args[0].target is aten.mul.Tensor
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in (aten.view.default, aten.unsqueeze.default, aten.slice.Tensor):
            args = fx.node.map_arg(node.args, lambda a: a.meta["val"])
            with program.fake_mode:
                again = node.target(*args)
            assert (again.shape, again.stride()) == (node.meta["val"].shape, node.meta["val"].stride())


# ---- reductions of one P by one op ------------------------------


TOGETHER = [SumGradSquared(), BatchL2Grad(), Variance()]


def wide() -> tuple[nn.Module, Tensor, Tensor]:
    """Layers of a size at which products are what costs."""
    x, y = images(4, 4, 18, 18)
    model = head(nn.Conv2d(4, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AvgPool2d(6))
    model(x)
    return model, x, y


def by_weight(program) -> list[fx.Node]:
    """Convolutions that give a weight's gradient."""
    return [n for n in calls(program, aten.convolution_backward.default) if n.args[-1][1]]


def test_one_op_serves_the_reductions_of_a_layer():
    """Gradient, sum of squares, norms and variance: of each convolution's products once."""
    model, x, y = wide()
    compiled = fxcurv.compile(model, F.cross_entropy, TOGETHER)
    program = compiled.lower(x, y)
    shared = calls(program, torch.ops.fxcurv.outer_moments_conv.default)
    assert [n.args[2:5] for n in shared] == [(True, True, True)] * 2 and not by_weight(program)
    assert {d.algorithm for d in program.decisions if d.param in ("0.weight", "3.weight")} == {"together"}
    result = compiled(x, y)
    each = [
        torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), model.parameters())
        for a, b in zip(x, y, strict=True)
    ]
    for (name, _), rows in zip(model.named_parameters(), zip(*each, strict=True), strict=True):
        p = torch.stack(rows) / len(x)
        torch.testing.assert_close(result.grad[name], p.sum(0))
        torch.testing.assert_close(result.sum_grad_squared[name], p.square().sum(0))
        torch.testing.assert_close(result.batch_l2[name], p.square().flatten(1).sum(1))
        torch.testing.assert_close(result.variance[name], p.var(0, correction=0))


def test_not_together_where_results_are_differentiated_again():
    model, x, y = wide()
    result = fxcurv.compile(model, F.cross_entropy, TOGETHER)(x, y, create_graph=True)
    assert "moments" not in str(result.sum_grad_squared["0.weight"].grad_fn)
    weight = model[0].weight
    (found,) = torch.autograd.grad(result.sum_grad_squared["0.weight"].sum(), weight)
    total = 0.0
    for a, b in zip(x, y, strict=True):
        loss = F.cross_entropy(model(a[None]), b[None]) / len(x)
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        total = total + torch.autograd.grad(first.square().sum(), weight)[0]
    torch.testing.assert_close(found, total)


def test_not_together_where_individual_gradients_are_there():
    """P is a result: what is asked for beside it reads it."""
    model, x, y = wide()
    program = lowered(model, [BatchGrad(), *TOGETHER], x, y)
    assert not calls(program, torch.ops.fxcurv.outer_moments_conv.default)
    chosen = {(d.param, d.savefield): d.algorithm for d in program.decisions}
    assert chosen["3.weight", "sum_grad_squared"] == chosen["3.weight", "batch_l2"] == "reuse P"


# ---- memory of earlier results ------------------------------


@pytest.mark.parametrize("extension", [DiagGGNExact(), BatchDiagGGNExact(), BatchGrad()], ids=lambda e: e.savefield)
@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_results_of_convolutions_in_memory_of_earlier_ones(extension, groups, monkeypatch):
    """Of any size; what an earlier batch left there is gone."""
    monkeypatch.setattr(importlib.import_module("fxcurv.passes.recycle"), "WORTHWHILE", 1)
    x, y = images(4, 8, 12, 12)
    model = head(nn.Conv2d(8, 32, 3, padding=1, groups=groups), nn.Sigmoid(), nn.AvgPool2d(6))
    model(x)
    compiled = fxcurv.compile(model, F.cross_entropy, [extension])
    for start in (0, 1):
        result = compiled(x[start:][:3], y[start:][:3])
        agree(result, Oracle(model, F.cross_entropy, x[start:][:3], y[start:][:3], kind="ce"), [extension])
        del result
    assert compiled.lower(x[:3], y[:3]).buffers
