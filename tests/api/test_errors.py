"""What bad input gets: an error of `fxcurv.errors` that names place and way out, and a model left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv import errors
from fxcurv.extensions import (
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    Extension,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)

N = 6


class Net(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.layer, *args, **kwargs)


class Round(torch.autograd.Function):
    """A straight-through estimator that no trace can follow."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy().round())

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def centred(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = layer(x)
    return h - h.mean(0)


def branched(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = layer(x)
    if h.sum() > 0:
        h = -h
    return h


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1, N * 4).reshape(N, 4).to(dtype)


def classes() -> torch.Tensor:
    return torch.arange(N) % 3


CE = nn.CrossEntropyLoss()


class Bad(NamedTuple):
    """A call that must fail, and what its message must say."""

    error: type[Exception]
    says: list[str]
    model: Callable[[], nn.Module] = mlp
    loss: Any = CE
    extensions: Any = (BatchGrad(),)
    x: Any = None
    y: Any = None
    call: dict[str, Any] = {}
    options: dict[str, Any] = {}


def nothing(*_: Any) -> Any:
    return None


def clamped(f: torch.Tensor) -> torch.Tensor:
    v = f.exp()
    with torch.no_grad():
        v.clamp_(min=1.0)
    return v


BAD = {
    # extensions
    "extension class": Bad(errors.ExtensionError, ["BatchGrad is a class", "BatchGrad()"], extensions=[BatchGrad]),
    "extension class alone": Bad(errors.ExtensionError, ["BatchGrad is a class"], extensions=BatchGrad),
    "unknown extension": Bad(errors.ExtensionError, ["'BatchGrad'", "fxcurv.extensions"], extensions=["BatchGrad"]),
    "extension string": Bad(errors.ExtensionError, ["'BatchGrad'", "fxcurv.extensions"], extensions="BatchGrad"),
    "extensions None": Bad(errors.ExtensionError, ["None"], extensions=None),
    "asked twice": Bad(errors.ExtensionError, ["grad_batch", "savefield="], extensions=[BatchGrad(), BatchGrad()]),
    "one field": Bad(
        errors.ExtensionError,
        ["variance", "savefield="],
        extensions=[Variance(), SumGradSquared(savefield="variance")],
    ),
    "field loss": Bad(errors.ExtensionError, ["'loss'"], extensions=[BatchGrad(savefield="loss")]),
    "field attach": Bad(errors.ExtensionError, ["'attach'"], extensions=[BatchGrad(savefield="attach")]),
    "field shape": Bad(errors.ExtensionError, ["'shape'", "tensor"], extensions=[BatchGrad(savefield="shape")]),
    "field grad": Bad(errors.ExtensionError, ["'grad'"], extensions=[BatchGrad(savefield="grad")]),
    "field no name": Bad(errors.ExtensionError, ["'a b'"], extensions=[BatchGrad(savefield="a b")]),
    "sample out of range": Bad(
        errors.ArgumentError,
        ["BatchGrad", "sample 9 of a batch of 6"],
        extensions=[BatchGrad(subsampling=[0, 9])],
    ),
    "column out of range": Bad(
        errors.ArgumentError, ["SqrtGGNMC", "sample 6"], extensions=[SqrtGGNMC(subsampling=[6])]
    ),
    # arguments
    "no module": Bad(errors.ArgumentError, ["nn.Module", "function"], model=lambda: centred),
    "loss no callable": Bad(errors.ArgumentError, ["not callable", "str"], loss="mse"),
    "no loss": Bad(errors.ArgumentError, ["BatchGrad", "needs a loss"], loss=None),
    "nothing asked": Bad(errors.ArgumentError, ["needs a loss"], loss=None, extensions=[]),
    "targets without loss": Bad(errors.ArgumentError, ["targets"], loss=None, extensions=[Jacobian()]),
    "no parameter": Bad(errors.ArgumentError, ["no trainable parameter", "requires_grad"], model=nn.Tanh),
    "all frozen": Bad(errors.ArgumentError, ["no trainable parameter"], model=lambda: mlp().requires_grad_(False)),
    "lazy": Bad(errors.ArgumentError, ["'weight'", "not initialised"], model=lambda: nn.LazyLinear(3)),
    "empty batch": Bad(errors.ArgumentError, ["batch is empty"], x=inputs()[:0], y=classes()[:0]),
    "no tensor": Bad(errors.ArgumentError, ["no tensor"], x=()),
    "an array": Bad(errors.ArgumentError, ["inputs", "ndarray"], x=(inputs(), inputs().numpy())),
    "target array": Bad(errors.ArgumentError, ["targets", "ndarray"], y=classes().numpy()),
    "complex": Bad(errors.ArgumentError, ["complex"], x=inputs(torch.complex64)),
    "batch sizes": Bad(
        errors.ArgumentError,
        ["batch sizes [3, 6]", "batch_dim="],
        model=lambda: Net(lambda layer, a, b: layer(a) + layer(b).sum(0)),
        x=(inputs(), inputs()[:3]),
    ),
    "batch_dim out of range": Bad(errors.ArgumentError, ["batch_dim 2"], options={"batch_dim": 2}),
    "batch_dim None": Bad(errors.ArgumentError, ["no input has a batch"], options={"batch_dim": None}),
    "batch_dim length": Bad(errors.ArgumentError, ["2 entries for 1"], options={"batch_dim": (0, 0)}),
    "batch_dim name": Bad(
        errors.ArgumentError,
        ["batch_dim", "'wrong'"],
        x={"input": inputs()},
        options={"batch_dim": {"wrong": 1}},
    ),
    "batch_dim type": Bad(errors.ArgumentError, ["batch_dim", "'0'"], options={"batch_dim": "0"}),
    "split": Bad(errors.ArgumentError, ["split='nowhere'"], options={"split": "nowhere"}),
    "seed float": Bad(errors.ArgumentError, ["seed=1.5"], extensions=[DiagGGNMC()], call={"seed": 1.5}),
    "seed vector": Bad(
        errors.ArgumentError, ["seed=", "int64[2]"], extensions=[DiagGGNMC()], call={"seed": torch.arange(2)}
    ),
    "seed and generator": Bad(
        errors.ArgumentError,
        ["seed=", "generator="],
        extensions=[DiagGGNMC()],
        call={"seed": 1, "generator": torch.Generator()},
    ),
    # targets
    "targets float": Bad(errors.ArgumentError, ["targets, float32[6]", "Way out"], y=classes().float()),
    "targets int32": Bad(errors.ArgumentError, ["targets, int32[6]", "int64"], y=classes().int()),
    "targets too few": Bad(errors.ArgumentError, ["targets, int64[4]"], y=classes()[:4]),
    "targets shape": Bad(errors.ArgumentError, ["targets, int64[6, 1]"], y=classes()[:, None]),
    "targets out of range": Bad(
        errors.ArgumentError, ["targets, int64[6]", "out of bounds", "number of classes"], y=classes() + 1
    ),
    "targets of another width": Bad(
        errors.ArgumentError, ["targets, float32[6, 2]"], loss=F.mse_loss, y=torch.zeros(N, 2)
    ),
    "targets missing": Bad(errors.ArgumentError, ["targets, none", "argument"], loss=F.mse_loss, y=nothing),
    # inputs that the model refuses
    "input width": Bad(errors.CaptureError, ["module '0'", "Linear", "shapes"], x=torch.zeros(N, 5)),
    "input dtype": Bad(errors.FxcurvError, ["linear", "module '0'", "float64[6, 4]"], x=inputs(torch.float64)),
    # losses
    "loss of samples": Bad(errors.LossError, ["float32[6]", ".mean()"], loss=nn.CrossEntropyLoss(reduction="none")),
    "loss a number": Bad(errors.LossError, ["a float", "not a tensor"], loss=lambda f, y: 3.0),
    "loss .item()": Bad(errors.LossError, ["not a tensor"], loss=lambda f, y: F.cross_entropy(f, y).item()),
    "loss an integer": Bad(
        errors.LossError, ["int64", "not differentiable"], loss=lambda f, y: (f.argmax(1) == y).sum()
    ),
    "loss not differentiable": Bad(
        errors.LossError,
        ["does not depend", "differentiable"],
        loss=lambda f, y: (f.argmax(1) == y).float().mean(),
    ),
    "loss of targets": Bad(
        errors.LossError, ["does not depend on any trainable parameter"], loss=lambda f, y: y.float().sum()
    ),
    "loss detached": Bad(
        errors.LossError, ["does not depend", "detach"], loss=lambda f, y: F.cross_entropy(f.detach(), y)
    ),
    "loss CTC": Bad(
        errors.LossError,
        ["ctc_loss", __file__, "F.ctc_loss(f.log_softmax", "logsumexp"],
        loss=lambda f, y: F.ctc_loss(f.log_softmax(1)[:, None], y[:1], torch.tensor([N]), torch.tensor([1])),
    ),
    "variance clamped in place": Bad(
        errors.CaptureError,
        ["clamp_", "no_grad", __file__, "v.clamp_(min=1.0)", "Way out"],
        loss=lambda f, y: (f.square() / clamped(f)).mean(),
    ),
    "loss times -1": Bad(
        errors.LossError,
        ["not convex", "DiagGGNExact", "Way out"],
        loss=lambda f, y: -F.cross_entropy(f, y),
        extensions=[DiagGGNExact()],
    ),
    "loss concave": Bad(
        errors.LossError,
        ["not convex", "SqrtGGNExact", "Way out"],
        loss=lambda f, y: f.sin().sum(),
        extensions=[SqrtGGNExact()],
    ),
    "loss squared": Bad(
        errors.FxcurvError,
        ["pow", "in the loss", __file__, "BatchGrad"],
        loss=lambda f, y: F.cross_entropy(f, y) ** 2,
    ),
    "loss squared, GGN": Bad(
        errors.FxcurvError,
        ["pow", "in the loss", "DiagGGNMC"],
        loss=lambda f, y: F.cross_entropy(f, y) ** 2,
        extensions=[DiagGGNMC()],
    ),
    # samples that interact
    "batch norm in training": Bad(
        errors.MixedSamplesError,
        ["batch_norm", "module '1'", "BatchGrad", "eval()", "GroupNorm"],
        model=batch_norm,
    ),
    "samples centred": Bad(
        errors.MixedSamplesError,
        ["sub", __file__, "return h - h.mean(0)", "BatchGrad"],
        model=lambda: Net(centred),
    ),
    # models that cannot be traced
    "data-dependent branch": Bad(
        errors.CaptureError,
        ["torch.export", __file__, "if h.sum() > 0:", "torch.where"],
        model=lambda: Net(branched),
    ),
    "numpy": Bad(
        errors.CaptureError,
        ["torch.export", __file__, "numpy"],
        model=lambda: Net(lambda layer, x: layer(x) * float(x.numpy().max())),
    ),
    "custom function": Bad(
        errors.CustomFunctionError,
        ["'Round'", __file__, "Way out"],
        model=lambda: Net(lambda layer, x: Round.apply(layer(x))),
    ),
    "random op without a rule": Bad(
        errors.UnsupportedOpError,
        ["rrelu", "module '1'", "random", "Way out"],
        model=lambda: nn.Sequential(nn.Linear(4, 5), nn.RReLU(), nn.Linear(5, 3)),
    ),
    "writes to its input": Bad(
        errors.CaptureError, ["in place", "clone"], model=lambda: Net(lambda layer, x: layer(x.add_(1)))
    ),
}


def call(bad: Bad, model: Any) -> None:
    compiled = fxcurv.compile(model, bad.loss, bad.extensions, **bad.options)
    x = inputs() if bad.x is None else bad.x
    y = classes() if bad.y is None else bad.y
    compiled(x, *([] if y is nothing else [y]), **bad.call)


@pytest.mark.parametrize("name", BAD)
def test_message(name: str) -> None:
    """The message says it, and nothing is half-written."""
    bad = BAD[name]
    model = bad.model()
    compilable = isinstance(model, nn.Module) and name != "lazy"
    before = snapshot(model) if compilable else None
    with pytest.raises(bad.error) as caught:
        call(bad, model)
    assert isinstance(caught.value, errors.FxcurvError)
    for words in bad.says:
        assert words in str(caught.value)
    assert not compilable or snapshot(model) == before


def snapshot(model: nn.Module) -> Any:
    """All that a call could leave behind, comparable."""
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    attributes = {name: (p.grad, set(vars(p))) for name, p in model.named_parameters()}
    return state, attributes, [(m.training, set(vars(m))) for m in model.modules()]


def test_buffers_wait_for_the_checks() -> None:
    """Running statistics are not written by a call that fails, whenever it fails."""
    model = batch_norm()
    compiled = fxcurv.compile(model, CE, [])
    with pytest.raises(errors.ArgumentError, match="out of bounds"):
        compiled(inputs(), classes() + 1)
    assert model[1].num_batches_tracked == 0
    compiled(inputs(), classes())
    with pytest.raises(errors.ArgumentError, match="out of bounds"):
        compiled(inputs(), classes() + 1)
    assert model[1].num_batches_tracked == 1


def test_gradient_alone_accepts_more() -> None:
    """Batch norm in training mode and a function of the reduced loss have a gradient."""
    for model, loss in ((batch_norm(), CE), (mlp(), lambda f, y: F.cross_entropy(f, y) ** 2)):
        expected = torch.autograd.grad(loss(model(inputs()), classes()), list(model.parameters()))
        result = fxcurv.compile(model, loss)(inputs(), classes())
        for actual, value in zip(result.grad.values(), expected, strict=True):
            torch.testing.assert_close(actual, value)


def test_first_order_accepts_losses_that_are_not_convex() -> None:
    result = fxcurv.compile(mlp(), lambda f, y: f.sin().sum(), [BatchGrad()])(inputs(), classes())
    torch.testing.assert_close(result.grad_batch["0.weight"].sum(0), result.grad["0.weight"])


def test_helper_functions_are_located() -> None:
    """The line is the innermost of the user's, also outside `forward`."""

    def helper(h: torch.Tensor) -> torch.Tensor:
        return h / h.std(0)  # the line

    with pytest.raises(errors.MixedSamplesError, match="# the line"):
        fxcurv.compile(Net(lambda layer, x: helper(layer(x))), CE, [BatchGrad()])(inputs(), classes())


def test_nan_passes_through() -> None:
    x = inputs()
    x[2, 0] = float("nan")
    extensions = [BatchGrad(), Variance(), ClippedGrad(1.0), DiagGGNExact(), DiagGGNMC(), SqrtGGNExact()]
    result = fxcurv.compile(mlp(), CE, extensions)(x, classes())
    assert result.loss.isnan()
    for field in ("grad", "variance", "grad_clipped", "diag_ggn_exact", "diag_ggn_mc"):
        assert getattr(result, field)["0.weight"].isnan().any(), field
    poisoned = result.grad_batch["0.weight"].isnan().flatten(1).any(1)
    assert poisoned.tolist() == [False, False, True, False, False, False]


def all_extensions() -> list[Extension]:
    found = [getattr(fxcurv.extensions, name) for name in fxcurv.extensions.__all__]
    found = [e for e in found if isinstance(e, type) and issubclass(e, Extension) and e is not Extension]
    return [e(1.0) if e is ClippedGrad else e() for e in found]


def test_parameters_that_the_loss_does_not_reach_get_zeros() -> None:
    model = mlp()
    model.unused = nn.Linear(2, 2)
    model.scalar = nn.Parameter(torch.ones(()))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    extensions = all_extensions()
    result = fxcurv.compile(model, CE, extensions, debug=True)(inputs(), classes())
    fields = ["grad", *(e.savefield for e in extensions)]
    # Kronecker factors and products have tests of their own
    plain = [f for f in fields if isinstance(getattr(result, f)["0.bias"], torch.Tensor)]
    assert len(plain) >= 14
    for field in plain:
        values = getattr(result, field)
        for name in ("unused.weight", "unused.bias", "scalar"):
            reached, shape = values["0.bias"], dict(model.named_parameters())[name].shape
            lead = reached.shape if field == "batch_l2" else (*reached.shape[:-1], *shape)
            assert values[name].shape == lead, (field, name)
            assert not values[name].any(), (field, name)
    result.attach()
    assert not model.unused.weight.grad.any()
