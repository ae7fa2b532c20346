"""check="first": every fault that was ever seen, put back, is caught at the first call; the truth passes and is not changed."""

from __future__ import annotations

import contextlib
import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net, mlp
from cases import CASES
from claims import Claims, centre
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ArgumentError, MixedSamplesError, SelfCheckError
from fxcurv.extensions import (
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagHessian,
    Jacobian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from fxcurv.ir.placement import Shard
from fxcurv.rules.base import REWRITES, RULES
from fxcurv.rules.pointwise import Pointwise
from fxcurv.runtime import programs, selfcheck

aten = torch.ops.aten
CE = nn.CrossEntropyLoss()


def data(n=6):
    torch.manual_seed(0)
    return torch.randn(n, 4), torch.randint(3, (n,))


def net(run=None, **parts):
    torch.manual_seed(0)
    return Net(run or (lambda m, x: m.last(m.act(m.first(x)))), first=nn.Linear(4, 5), last=nn.Linear(5, 3), **parts)


class Round(torch.autograd.Function):
    """Straight-through rounding, as PyTorch's documentation writes it."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


@contextlib.contextmanager
def captured_with(**attributes):
    """Capture sees other attributes than the model has: whatever tracing loses or remembers wrongly."""
    real = programs.capture

    def capture(subject, *args):
        with contextlib.ExitStack() as stack:
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(subject if name == "loss" else subject.model, name, value))
            return real(subject, *args)

    with mock.patch.object(programs, "capture", capture):
        yield


def caught(model, extensions=(), loss=CE, args=None, **options):
    """The message of the error at the first call."""
    torch.manual_seed(1)
    with pytest.raises(SelfCheckError) as error:
        fxcurv.compile(model, loss, extensions, **options)(*(args or data()))
    for words in ("report it", "check=None", "Way out"):
        assert words in str(error.value)
    return str(error.value)


def rounded(m, x):
    return m.last(m.f(m.first(x)))


# ---- faults put back ----


def test_a_dropped_custom_backward():
    with captured_with(f=torch.round):
        message = caught(net(rounded, f=Round.apply))
    assert "the gradient of 'first." in message and "derivative is lost in capture" in message


def test_a_dropped_custom_backward_in_a_module():
    class Straight(nn.Module):
        function = staticmethod(Round.apply)

        def forward(self, x):
            return self.function(x)

    model = net(act=Straight())
    real = programs.capture

    def capture(*args):
        with mock.patch.object(Straight, "function", staticmethod(torch.round)):
            return real(*args)

    with mock.patch.object(programs, "capture", capture):
        message = caught(model)
    assert "module 'act' (Straight)" in message and "aten.round" in message and __file__ in message


@pytest.mark.parametrize("scale", [3.0, 1e-3])
def test_stale_python_state(scale):
    model = net(lambda m, x: m.last(m.first(x).tanh() * m.scale), scale=2.0)
    with captured_with(scale=scale):
        assert "the loss is" in caught(model)


def test_a_wrong_value_is_named_by_module_and_op():
    model = net(act=nn.Softplus(beta=2.0))

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model, nn.Sequential(nn.Tanh(), nn.Linear(3, 3))

        def forward(self, x):
            return self.head(self.body(x))

    real = programs.capture

    def capture(*args):
        with mock.patch.object(model.act, "beta", 1.0):
            return real(*args)

    with mock.patch.object(programs, "capture", capture):
        message = caught(Later())
    assert "module 'body.act' (Softplus)" in message and "op aten.softplus" in message


@pytest.mark.parametrize("kind", ["custom op", "running sum"])
def test_a_wrong_placement(kind):
    op, run = {
        "custom op": (torch.ops.fxcurv_tests.centre.default, lambda m, x: m.last(centre(m.first(x)))),
        "running sum": (aten.cumsum.default, lambda m, x: m.last(m.first(x).cumsum(0))),
    }[kind]
    with pytest.raises(MixedSamplesError, match="mixes samples"):
        fxcurv.compile(net(run), CE, [BatchGrad()], rules={op: Claims(Shard(0))})(*data())


def test_a_wrong_transpose_is_named():
    wrong = Pointwise(d1=lambda x, y: 1 - y, d2=lambda x, y: -2 * y * (1 - y * y))
    with mock.patch.dict(RULES, {aten.tanh.default: wrong}):
        message = caught(net(act=nn.Tanh()), [BatchGrad()])
    assert "op aten.tanh.default" in message and "transpose is not the derivative" in message


def test_a_wrong_transpose_of_a_rule_of_the_users():
    wrong = Pointwise(d1=lambda x, y: y)
    message = caught(net(act=nn.Sigmoid()), rules={aten.sigmoid.default: wrong})
    assert "op aten.sigmoid.default in module 'act'" in message


def test_a_wrong_rewrite():
    with mock.patch.dict(REWRITES, {aten.prelu.default: lambda x, w: torch.where(x > 0, x, 0.9 * w * x)}):
        message = caught(net(act=nn.PReLU()))
    assert "module 'act' (PReLU)" in message and "the loss is" in message


def test_nan_where_pytorch_gives_zeros():
    """A row that attends to nothing."""

    def by_softmax(q, k, v, mask):
        return (q @ k.mT).div(q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def run(m, x):
        h = m.first(x.unsqueeze(1).expand(-1, 3, -1))
        mask = torch.ones(3, 3, dtype=torch.bool, device=x.device).tril(-1)
        return m.last(m.attend(h, h, h, mask).mean(1))

    with captured_with(attend=by_softmax):
        message = caught(net(run, attend=F.scaled_dot_product_attention))
    assert "is NaN" in message


def test_a_nan_of_the_model_is_no_fault():
    model = net(lambda m, x: m.last(m.first(x).tanh()) + torch.zeros_like(x[:, :1]).log() * 0)
    assert fxcurv.compile(model, CE, [BatchGrad()])(*data()).loss.isnan()


def test_an_update_of_a_buffer_is_missing():
    model = net(act=nn.BatchNorm1d(5))
    real = programs.capture

    def capture(*args):
        program = real(*args)
        del program.mutations["act.running_mean"]
        return program

    with mock.patch.object(programs, "capture", capture):
        message = caught(model)
    assert "buffer 'act.running_mean'" in message
    assert (model.act.running_mean == 0).all() and model.act.num_batches_tracked == 0


@pytest.mark.parametrize("factor", [2.0, 1 / 6])
def test_a_wrong_scaling_of_the_loss(factor):
    with captured_with(loss=lambda f, y: factor * CE(f, y)):
        message = caught(net(act=nn.Tanh()))
    assert "the loss is not" in message and "the loss is" in message


def test_a_wrong_scaling_of_the_loss_in_its_gradient():
    rule = type(RULES[aten.cross_entropy_loss.default])
    right = rule.transpose
    with mock.patch.object(rule, "transpose", lambda *args: [None if t is None else 6 * t for t in right(*args)]):
        assert "op aten.cross_entropy_loss" in caught(net(act=nn.Tanh()))


def test_a_hook_that_changes_the_output_is_ignored():
    model = net(act=nn.Tanh())
    model.act.register_forward_hook(lambda module, args, out: 2 * out)
    real = programs.capture

    def capture(*args):
        with mock.patch.object(model.act, "_forward_hooks", type(model.act._forward_hooks)()):
            return real(*args)

    with mock.patch.object(programs, "capture", capture):
        assert "module 'act' (Tanh)" in caught(model)


def _scaled(extract):
    return lambda self, param: param.emit(torch.mul, extract(self, param), 1.001)


@pytest.mark.parametrize(
    "wrong, others",
    [
        (BatchGrad, []),
        (BatchL2Grad, [BatchGrad()]),
        (BatchL2Grad, [SumGradSquared()]),
        (SumGradSquared, [BatchGrad()]),
        (Variance, [SumGradSquared()]),
        (BatchDiagGGNExact, [DiagGGNExact()]),
        (BatchDiagHessian, [DiagHessian()]),
        (SqrtGGNExact, [BatchDiagGGNExact()]),
        (DiagGGNExact, [SqrtGGNExact()]),
        (Jacobian, []),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(type(e).__name__ for e in v) or "alone",
)
def test_a_wrong_sum(wrong, others):
    with mock.patch.object(wrong, "extract", _scaled(wrong.extract)):
        assert wrong.__name__ in caught(net(act=nn.Tanh()), [wrong(), *others])


def test_a_wrong_sum_behind_dropout():
    with mock.patch.object(BatchGrad, "extract", _scaled(BatchGrad.extract)):
        assert "BatchGrad" in caught(net(act=nn.Dropout(0.5)), [BatchGrad()])


def test_wrong_values_behind_dropout():
    model = net(lambda m, x: m.last(m.act(m.first(x)) * m.scale), act=nn.Dropout(0.5), scale=2.0)
    with captured_with(scale=2.5):
        assert "with the same random draws" in caught(model)


def test_wrong_norms():
    right = fxcurv.extensions.first_order._norm
    with mock.patch.object(fxcurv.extensions.first_order, "_norm", lambda squares: right(squares) * 1.001):
        assert "norms squared" in caught(net(act=nn.Tanh()), [ClippedGrad(0.1), BatchL2Grad()])


def test_a_wrong_sum_beside_a_regulariser():
    model = net(act=nn.Tanh())

    def loss(f, y):
        return CE(f, y) + 0.1 * model.first.weight.square().sum()

    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    compiled(*data())
    assert "BatchGrad" in compiled.explain(*data()).check and "NOT" not in compiled.explain(*data()).check
    with mock.patch.object(BatchGrad, "extract", _scaled(BatchGrad.extract)):
        assert "first.weight" in caught(model, [BatchGrad(params="first.weight")], loss)


# ---- the truth passes, and nothing else changes ----

QUICK = {"mlp_relu", "mlp_single_sample", "batch_norm2d", "output_tuple", "unreached_parameter"}
QUANTITIES = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), ClippedGrad(0.1)]


def settings():
    """Single precision, whose rounding could seem a fault: every third case, and training where that is another model."""
    for k, (name, case) in enumerate(CASES.items()):
        evaluated = [False] if name in QUICK or k % 3 == 0 else []
        for training in [*evaluated, *([True] if _trains(case.build()[0]) else [])]:
            yield pytest.param(name, training, marks=[] if name in QUICK else pytest.mark.slow)


def _trains(model):
    return any(
        isinstance(m, nn.Dropout | nn.modules.batchnorm._NormBase) or getattr(m, "dropout", 0) for m in model.modules()
    )


@pytest.mark.parametrize(("name", "training"), [*settings()])
def test_the_truth_passes(name, training):
    """No false alarm, and nothing left out; in double precision extensions/test_quantities.py checks every case."""
    model, loss, inputs, targets = CASES[name].build(torch.float32)
    model.train(training)
    for extensions in (QUANTITIES, []):  # the gradient alone, where samples interact
        compiled = fxcurv.compile(model, loss, extensions, batch_dim=CASES[name].batch_dim)
        with contextlib.suppress(MixedSamplesError):
            compiled(inputs, targets)
            break
    note = compiled.explain(inputs, targets).check
    assert note.startswith("loss, output, gradient") and "NOT" not in note


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_results_are_those_of_an_unchecked_program(kind):
    results = []
    for check in (None, "first", "always", "probe"):
        model = net(act=nn.Dropout(0.5) if kind == "dropout" else nn.BatchNorm1d(5))
        compiled = fxcurv.compile(model, CE, [BatchGrad()] if kind == "dropout" else [DiagGGNExact()], check=check)
        torch.manual_seed(5)
        values = [t for _ in range(2) for t in torch.utils._pytree.tree_leaves(compiled(*data()))]
        results.append([t for t in values if isinstance(t, Tensor)] + [*model.buffers(), torch.rand(3)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_everything_is_left_as_it_was():
    model = net(act=nn.BatchNorm1d(5))
    model.counts = {"calls": [0]}

    def count(module, args, out):
        random.random()

    handle = model.last.register_forward_hook(count)
    grad = model.first.weight.grad = torch.ones(5, 4)
    compiled = fxcurv.compile(model, CE, check="always", update_buffers=False)
    x, y = data()
    compiled.lower(x, y)
    before = {name: t.clone() for name, t in model.named_buffers()}
    buffers, versions = dict(model.named_buffers()), {n: t._version for n, t in model.named_buffers()}
    python = random.getstate()
    random.random()  # the hook runs once, as in the plain model
    after = random.getstate()
    random.setstate(python)
    with torch.autocast("cpu", torch.bfloat16, enabled=False), torch.inference_mode():
        result = compiled(x.clone(), y)
        assert torch.is_inference_mode_enabled()
    assert compiled._programs.named.program_0.note.startswith("loss, output, gradient, buffers")
    assert random.getstate() == after
    for name, t in model.named_buffers():
        assert t is buffers[name] and t._version == versions[name] and torch.equal(t, before[name])
    assert model.first.weight.grad is grad and (grad == 1).all() and not result.loss.requires_grad
    handle.remove()
    assert not model.last._forward_hooks


def test_gradients_that_are_rounding_alone():
    """A bias before batch norm, a shift before a norm without parameters, and a float32 norm in a float64 model."""
    x, y = data(16)
    model = net(act=nn.BatchNorm1d(5))
    fxcurv.compile(model, CE)(x, y)
    model = net(lambda m, x: m.last(F.layer_norm(m.first(x), (5,))))
    fxcurv.compile(model, CE, [*QUANTITIES, DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact()])(x, y)
    for kind in (torch.float32, torch.bfloat16):
        model = net(lambda m, x, kind=kind: m.last(m.first(x).to(kind).softmax(-1).double())).double()
        fxcurv.compile(model, CE, [*QUANTITIES, DiagGGNExact(), BatchDiagGGNExact()])(x.double(), y)


@pytest.mark.parametrize("seed", range(3))
def test_jacobians_that_are_rounding_alone(seed):
    """Of a bias before a norm of each channel by itself, in float64."""
    torch.manual_seed(seed)
    body = (
        nn.Conv2d(1, 2, 3, padding=1),
        nn.GroupNorm(2, 2),
        nn.Tanh(),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.GroupNorm(2, 2),
    )
    model = nn.Sequential(*body, nn.Flatten()).double()
    x = torch.randn(3, 1, 4, 4).double()
    found = fxcurv.compile(model, None, [Jacobian()])(x).jacobian["0.bias"]
    assert found.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, y = data(16)
    compiled = fxcurv.compile(net(act=nn.GELU()).to(dtype), CE, QUANTITIES)
    compiled(x.to(dtype), y)
    assert "NOT" not in compiled.explain(x.to(dtype), y).check


def test_autocast():
    x, y = data(16)
    compiled = fxcurv.compile(net(act=nn.GELU()), CE, QUANTITIES)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x, y)
        assert "NOT" not in compiled.explain(x, y).check


@pytest.mark.parametrize("layer", [nn.Dropout(0.4), nn.AlphaDropout(0.4)], ids=lambda m: type(m).__name__)
def test_random_ops(layer):
    compiled = fxcurv.compile(net(act=layer), CE, [BatchGrad()])
    compiled(*data())
    assert "NOT" not in compiled.explain(*data()).check


def test_attention_with_dropout():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    model = Net(lambda m, x: m.head(m.body(x)).mean(1), body=model, head=nn.Linear(8, 3))
    x, y = torch.randn(4, 5, 8), torch.randint(3, (4,))
    compiled = fxcurv.compile(model, CE, [BatchGrad()])
    compiled(x, y)
    assert "NOT" not in compiled.explain(x, y).check


def test_no_loss():
    x, _ = data()
    compiled = fxcurv.compile(net(act=nn.Tanh()), None, [Jacobian()])
    compiled(x)
    assert "output equal" in compiled.explain(x).check and "Jacobian" in compiled.explain(x).check


def test_create_graph_params_and_split():
    x, y = data()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.LogSoftmax(-1))
    compiled = fxcurv.compile(model, nn.NLLLoss(), [BatchGrad()], split="2", params="2")
    result = compiled(x, y, create_graph=True)
    assert result.loss.requires_grad and set(result.grad) == {"2.weight", "2.bias"}


def test_tokens():
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, 4), torch.randint(3, (3, 5))
    compiled = fxcurv.compile(mlp(), lambda f, y: CE(f.flatten(0, 1), y.flatten()), [*QUANTITIES], sample="token")
    compiled(x, y)
    assert "BatchGrad" in compiled.explain(x, y).check


def test_inside_torch_compile():
    """The program is checked when Dynamo asks for it, on the real values."""
    model, (x, y) = net(act=nn.Dropout(0.5)), data()
    compiled = fxcurv.compile(model, CE, [BatchGrad()])
    step = torch.compile(lambda x, y: compiled(x, y).grad_batch, backend="eager", fullgraph=True)
    step(x, y)
    assert compiled.explain(x, y).check.startswith("loss, output, gradient equal")
    with captured_with(scale=3.0), pytest.raises(Exception, match="the loss is"):
        wrong = fxcurv.compile(net(lambda m, x: m.last(m.first(x) * m.scale), scale=2.0), CE)
        torch.compile(lambda x, y: wrong(x, y).loss, backend="eager", fullgraph=True)(x, y)


def test_another_backend():
    model = net(lambda m, x: m.last(m.first(x) * m.scale), scale=2.0)
    fxcurv.compile(model, CE, backend="aot_eager")(*data())
    with captured_with(scale=3.0):
        assert "the loss is" in caught(model, backend="aot_eager")


def test_when():
    """Once per program, at every call, or never; the error comes again at the next call."""
    x, y = data()
    runs = []
    original = selfcheck.Check.run

    def counted(self, **options):
        runs.append(1)
        return original(self, **options)

    with mock.patch.object(selfcheck.Check, "run", counted):
        # whether one sample may run by the program for several is checked as well
        for check, expected in (("first", [1, 1, 2]), ("always", [1, 2, 4]), ("probe", [0, 0, 0]), (None, [0, 0, 0])):
            runs.clear()
            compiled = fxcurv.compile(net(act=nn.Tanh()), CE, check=check)
            assert "at the first call" in str(compiled.explain(x, y)) or check in ("probe", None)
            for call, count in zip((x, x, x[:1]), expected, strict=True):
                compiled(call, y[: len(call)])
                assert len(runs) == count
    with captured_with(scale=3.0):
        compiled = fxcurv.compile(net(lambda m, x: m.last(m.first(x) * m.scale), scale=2.0), CE)
        for _ in range(2):
            with pytest.raises(SelfCheckError):
                compiled(x, y)
    assert "checked: off" in str(fxcurv.compile(mlp(), CE, check=None).explain(x, y))


def test_state_that_changes_later_is_seen_by_always():
    model = net(lambda m, x: m.last(m.first(x) * m.scale), scale=2.0)
    compiled = fxcurv.compile(model, CE, check="always")
    compiled(*data())
    with mock.patch.object(programs.Programs, "find", lambda self, *_, **__: self.named.program_0):
        model.scale = 3.0
        with pytest.raises(SelfCheckError, match="the loss is"):
            compiled(*data())


def test_what_cannot_be_compared_is_said():
    model = net(lambda m, x: m.last(m.first(x) * torch.bernoulli(torch.full_like(x[:, :1], 0.5))))
    compiled = fxcurv.compile(model, CE)
    with mock.patch.object(selfcheck, "_grads", side_effect=NotImplementedError("no derivative")):
        compiled(*data())
    assert "NOT compared: the gradient, which plain autograd refuses (no derivative)" in compiled.explain(*data()).check


def test_a_model_that_fails_by_itself():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.fails = mlp(), True

        def forward(self, x):
            if self.fails and not torch.compiler.is_compiling():
                raise KeyError("missing")
            return self.net(x)

    with pytest.raises(ArgumentError, match="without fxcurv: KeyError"):
        fxcurv.compile(Failing(), CE)(*data())


def test_other_checks_are_refused():
    with pytest.raises(ArgumentError, match="'first', 'always', 'probe' or None"):
        fxcurv.compile(mlp(), CE, check="twice")


class Masked(nn.Module):
    """Attention that is not to see padding, before a norm."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(self, x):
        h = self.tokens(x)
        mask = torch.zeros(x.shape).masked_fill(x == 0, -torch.inf)
        weights = (h @ h.mT + mask.unsqueeze(1)).softmax(-1)
        return self.head(self.norm(h + weights @ h)).flatten(0, 1)


def test_rounding_is_measured_behind_an_infinite_mask():
    """What rounding may move the loss by is more than nothing where a mask holds minus infinity."""
    torch.manual_seed(0)
    model, x = Masked(), torch.randint(1, 11, (4, 5))
    x[:, 3:] = 0
    compiled, seen, finish = fxcurv.compile(model, nn.CrossEntropyLoss(), []), [], selfcheck.Check.finish

    def finished(check, values):
        seen.append(check.noise())
        finish(check, values)

    with mock.patch.object(selfcheck.Check, "finish", finished), torch.autocast("cpu", torch.bfloat16):
        compiled(x, x.flatten(), create_graph=True)
    (moved,) = seen
    assert set(moved) > {"the loss", "the output", "the gradient of 'head.weight'"}
    assert all(float(t) > 0 for t in moved.values())


class AddedMask(nn.Module):
    """Attention with a padding mask as transformers' encoders add it: nothing, or the dtype's least number."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, mask):
        added = (1.0 - mask.to(x.dtype))[:, None, :] * torch.finfo(x.dtype).min
        weights = (self.query(x) @ self.key(x).mT + added).softmax(-1)
        return self.head((weights @ x).mean(1))


def test_rounding_is_measured_beside_an_added_mask():
    """A mask's ones are exact: 1 - mask is zero, not the rounding of one, times the largest number."""
    torch.manual_seed(0)
    model = AddedMask().double()
    x, mask = torch.randn(5, 4, 4).double(), torch.ones(5, 4, dtype=torch.long)
    mask[1:, 2:] = 0
    compiled, seen, finish = fxcurv.compile(model, CE, [BatchGrad()]), [], selfcheck.Check.finish

    def finished(check, values):
        seen.append(check.noise())
        finish(check, values)

    with mock.patch.object(selfcheck.Check, "finish", finished):
        compiled({"x": x, "mask": mask}, torch.randint(3, (5,)))
    (moved,) = seen
    assert 0 < moved["the loss"] < 1e-14
    assert 0 < moved["the gradient of 'key.bias'"] < 1e-15  # which is nothing but rounding


def test_a_jacobian_of_an_output_in_another_dtype() -> None:
    """A model in single precision that returns double precision: its products with a cotangent are compared."""
    torch.manual_seed(0)
    model, x, y = Net(lambda m, x: m.l(x).double(), l=nn.Linear(3, 2)), torch.randn(4, 3), torch.randn(4, 2).double()
    found = fxcurv.compile(model, nn.MSELoss(), [Jacobian()])(x, y).jacobian["l.weight"]
    torch.testing.assert_close(found[:, 0, 0].double(), x.double())
