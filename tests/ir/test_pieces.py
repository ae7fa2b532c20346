"""What is traced once, and what is not traced a second time, gives the programs that tracing everything gives."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
import fxcurv.front.capture as capture
from fxcurv.extensions import BatchGrad, BatchL2Grad, DiagGGNMC
from fxcurv.ir import emit, pieces
from fxcurv.ir.graph import canonical_args, layout
from fxcurv.runtime import shared

EXTENSIONS = [BatchGrad(), DiagGGNMC(mc_samples=2)]


@pytest.fixture(autouse=True)
def nothing_kept():
    pieces.forget()
    yield
    pieces.forget()


def batch(n=5):
    torch.manual_seed(1)
    return torch.randn(n, 2, 8, 8), torch.randint(3, (n,))


def network():
    torch.manual_seed(0)
    images = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5)
    return nn.Sequential(*images, nn.Linear(27, 4), nn.Tanh(), nn.Linear(4, 3)).eval()


def program_of(model, x, y, extensions=EXTENSIONS, loss=F.cross_entropy):
    shared.forget()
    compiled = fxcurv.compile(model, loss, extensions=extensions)
    result = compiled(x, y, seed=3)
    return compiled.lower(x, y).graph_module.code, result


def numbers(result):
    return [result.loss, *(t for field in ("grad_batch", "diag_ggn_mc") for t in getattr(result, field).values())]


def test_pieces_outlive_their_program(monkeypatch):
    traced = []
    monkeypatch.setattr(emit, "_trace", lambda *args, trace=emit._trace: traced.append(args[1]) or trace(*args))
    x, y = batch()
    first = program_of(network(), x, y)
    count = len(traced)
    then = program_of(network(), x, y)
    assert count > 10 and len(traced) - count <= count // 10
    assert then[0] == first[0]
    assert all(torch.equal(a, b) for a, b in zip(numbers(then[1]), numbers(first[1]), strict=True))


@pytest.mark.parametrize("change", ["dtype", "size", "channels"])
def test_another_kind_of_input_gets_its_own(change):
    x, y = batch()
    program_of(network(), x, y)
    model = network()
    if change == "dtype":
        model, x = model.double(), x.double()
    elif change == "size":
        x, y = batch(7)
    else:
        model[5], model[7] = nn.Linear(27, 6), nn.Linear(6, 3)
    code, found = program_of(model, x, y)
    pieces.forget()
    fresh, expected = program_of(model, x, y)
    assert code == fresh
    assert all(torch.equal(a, b) for a, b in zip(numbers(found), numbers(expected), strict=True))


FACTOR = 2.0


def scaled(t):
    return t * FACTOR


class Scaled(BatchL2Grad):
    def extract(self, param):
        return param.emit(scaled, super().extract(param))


def test_a_function_of_the_users_is_traced_again():
    global FACTOR
    model, x, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3), torch.randint(2, (4,))
    found = {}
    for FACTOR in (2.0, 3.0):  # noqa: B007
        _, found[FACTOR] = program_of(model, x, y, [Scaled(savefield="scaled")])
    torch.testing.assert_close(found[3.0].scaled["0.weight"], 1.5 * found[2.0].scaled["0.weight"])


def test_numbers_of_different_types_are_different():
    assert pieces._bound(functools.partial(torch.mul, other=2)) != pieces._bound(
        functools.partial(torch.mul, other=2.0)
    )


# ---- graphs that are plain as exported ------------------------------


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = self.inner(x.reshape(x.shape[0], -1, 6)).unflatten(-1, (2, 6)).movedim(2, 1).chunk(3, -1)
        h = (q.transpose(-1, -2) @ k).flatten(2) @ torch.ones(4, 12).to(x)
        h = h + v.contiguous().mean((-1, -2), keepdim=True).squeeze(-1)
        return self.outer(F.dropout(h, 0.3, self.training).expand_as(h).sum(1))


def described(program):
    """What a captured graph is, without its nodes' names."""
    program.graph.eliminate_dead_code()
    index = {node: k for k, node in enumerate(program.graph.nodes)}
    for node in index:
        args = torch.fx.node.map_arg(canonical_args(node), lambda n: f"%{index[n]}")
        val = node.meta.get("val")
        kind = str(layout(val)) if isinstance(val, torch.Tensor) else ""
        yield node.op, str(node.target) if node.op == "call_function" else "", str(args), kind


@pytest.mark.parametrize("make", [network, Views])
def test_a_plain_graph_is_what_a_second_trace_gives(make, monkeypatch):
    model = make().eval()
    x, y = batch() if make is network else (torch.randn(5, 24), torch.randint(3, (5,)))
    found = {}
    for plain in (True, False):
        compiled = fxcurv.compile(model, F.cross_entropy, extensions=[BatchGrad()])
        own, asked = capture.is_plain, []
        monkeypatch.setattr(capture, "is_plain", lambda e: asked.append(own(e)) or plain and asked[-1])  # noqa: B023
        request = compiled._programs.request(compiled._subject, x, (y,), compiled._subject.autocast())
        found[plain] = list(described(compiled._programs.captured(request)))
        monkeypatch.setattr(capture, "is_plain", own)
        assert asked == [True]
    assert found[True] == found[False]


class Normalised(nn.Module):
    """Running statistics that `F.batch_norm` writes to, which its schema does not say."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        return self.linear(F.batch_norm(x, self.mean, self.var, training=True))


def test_what_writes_in_secret_is_not_plain():
    model, x, y = Normalised(), torch.randn(6, 3), torch.randint(2, (6,))
    expected = torch.zeros(3).lerp(x.mean(0), 0.1)
    fxcurv.compile(model, F.cross_entropy, extensions=[])(x, y)
    torch.testing.assert_close(model.mean, expected)


# ---- what is watched ------------------------------

MARGIN = 1.0


def distance(a, b):
    return MARGIN * (a - b).square().sum(-1)


def test_the_users_function_in_one_of_pytorch_is_watched():
    global MARGIN

    def loss(out, y):
        return F.triplet_margin_with_distance_loss(out, y, out.roll(1, -1), distance_function=distance, margin=50.0)

    model, x, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3), torch.randn(4, 2)
    compiled = fxcurv.compile(model, loss, extensions=[])
    for MARGIN in (1.0, 2.0):  # noqa: B007
        torch.testing.assert_close(compiled(x, y).loss, loss(model(x), y))


class Places:
    def __index__(self):
        return PLACE


PLACE = 0


def attended(q, k, v, *options, **named):
    return MARGIN * torch.matmul(q, k.mT).softmax(-1) @ v


def test_the_users_function_under_a_name_of_pytorch_is_watched(monkeypatch):
    global MARGIN

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    monkeypatch.setitem(vars(F), "scaled_dot_product_attention", attended)  # as users put their own in its place
    model, x, y = Attending(), torch.randn(3, 5, 4), torch.randint(4, (3,))
    compiled = fxcurv.compile(model, F.cross_entropy, extensions=[])
    for MARGIN in (1.0, 3.0):  # noqa: B007
        torch.testing.assert_close(compiled(x, y).loss, F.cross_entropy(model(x), y))


def test_an_index_of_the_users_is_watched():
    global PLACE

    class Picking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.place = nn.Linear(3, 4), Places()

        def forward(self, x):
            h = self.layer(x)
            return h[:, self.place :] * h[:, self.place].unsqueeze(1)

    model, x, y = Picking(), torch.randn(5, 3), torch.randint(2, (5,))
    compiled = fxcurv.compile(model, F.cross_entropy, extensions=[])
    for PLACE in (0, 2):  # noqa: B007
        torch.testing.assert_close(compiled(x, y).loss, F.cross_entropy(model(x), y))


# ---- what is around a call ------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_casts_of_an_autocast_around_the_call(dtype):
    model, x, y = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(6, 3), torch.randn(6, 2)
    compiled = fxcurv.compile(model, nn.MSELoss(), extensions=[])
    with torch.autocast("cpu", dtype):
        result, out = compiled(x, y), model(x)
        loss = nn.functional.mse_loss(out, y)
    assert result.output.dtype == out.dtype == dtype
    assert torch.equal(result.output, out) and torch.equal(result.loss, loss)
