"""What bad input gets: an error of `fxcurv.errors` that names place and way out, and a model left alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv.backpack
from fxcurv import errors, optim, passes
from fxcurv.extensions import (
    HMP,
    KFAC,
    KFLR,
    KFRA,
    NTK,
    PCHMP,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    Dots,
    EighGGN,
    Extension,
    GramGGN,
    GramGrad,
    Jacobian,
    Projected,
    Quadratic,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.rules import Pointwise

N = 6


class Net(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.layer, *args, **kwargs)


class Keeping(nn.Module):
    """Adds an activation to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(4, 3), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(self.layer(x))
        return self.kept[-1]


class Growing(nn.Module):
    """Reads a number that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale = self.scale * 1.5
        return self.scale * self.layer(x)


class Counting(nn.Module):
    """A loss that writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return F.cross_entropy(f, y) + self.seen


class Clipped(torch.autograd.Function):
    """A gradient that is clipped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g.clamp(-0.1, 0.1)


def hooked(g: Any, *_: Any) -> Any:
    return None


def with_hook(kind: str) -> nn.Module:
    model = Net(lambda layer, x: layer(x))
    if kind == "module":
        model.layer.register_full_backward_hook(hooked)
    else:
        model.layer.weight.register_hook(hooked)
    return model


def written(h: torch.Tensor, write: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    write(h)
    return h * h


def weights_written(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        layer.weight.mul_(2)
    return x


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


# a model whose bias its loss reads together with its output
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
    "empty batch": Bad(
        errors.ArgumentError, ["batch is empty", "products"], extensions=[HMP()], x=inputs()[:0], y=classes()[:0]
    ),
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
        ["op bool", __file__, "if h.sum() > 0:", "torch.where"],
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
        ["_standard_gamma", "random", __file__, "layer(x).exp()", "Way out"],
        model=lambda: Net(lambda layer, x: torch._standard_gamma(layer(x).exp())),
    ),
    "writes to its input": Bad(
        errors.CaptureError,
        ["in place", "clone", __file__, "layer(x.add_(1))"],
        model=lambda: Net(lambda layer, x: layer(x.add_(1))),
    ),
    "writes to a parameter": Bad(
        errors.CaptureError,
        ["mul_", "under no_grad", __file__, "layer.weight.mul_(2)", "Way out"],
        model=lambda: Net(weights_written),
    ),
    "writes through detach": Bad(
        errors.CaptureError,
        ["clamp_", "detach()", __file__, "h.detach().clamp_(min=0)", "Way out"],
        model=lambda: Net(lambda layer, x: written(layer(x), lambda h: h.detach().clamp_(min=0))),
    ),
    "writes through a view of .data": Bad(
        errors.CaptureError,
        ["mul_", ".data", __file__, "h.data[:, 1].mul_(2)", "Way out"],
        model=lambda: Net(lambda layer, x: written(layer(x), lambda h: h.data[:, 1].mul_(2))),
    ),
    "loss with a state": Bad(
        errors.CaptureError, ["buffer 'seen'", "Way out", __file__, "self.seen.add_(1)"], loss=Counting()
    ),
    "hook on a tensor": Bad(
        errors.CaptureError,
        ["register_hook", __file__, "h.register_hook(hooked)", "Way out"],
        model=lambda: Net(lambda layer, x: written(layer(x), lambda h: h.register_hook(hooked))),
    ),
    "hook of the backward pass": Bad(
        errors.CaptureError, ["module 'layer'", "backward hook 'hooked'", "Way out"], model=lambda: with_hook("module")
    ),
    "hook on a parameter": Bad(
        errors.CaptureError,
        ["'weight' of module 'layer'", "hook 'hooked'", "Way out"],
        model=lambda: with_hook("parameter"),
    ),
    "keeps an activation": Bad(errors.CaptureError, ["'kept'", "side effect", "Way out"], model=lambda: Keeping()),
    "changes what it reads": Bad(errors.CaptureError, ["'scale'", "changes it", "Way out"], model=lambda: Growing()),
    "a number by float()": Bad(
        errors.CaptureError,
        ["op float", "number of Python's", __file__, "float(layer(x).max())", "Way out"],
        model=lambda: Net(lambda layer, x: layer(x) * float(layer(x).max())),
    ),
    "a size that depends on values": Bad(
        errors.CaptureError,
        ["size depends on values", __file__, "h[h > 0]", "torch.where"],
        model=lambda: Net(lambda layer, x: layer(x) + (lambda h: h[h > 0].sum())(layer(x))),
    ),
    "a complex output": Bad(
        errors.UnsupportedOpError,
        ["complex", __file__, "torch.fft.fft(layer(x))", "Way"],
        model=lambda: Net(lambda layer, x: torch.fft.fft(layer(x))),
        loss=lambda f, y: f.abs().mean(),
    ),
    "batch norm without running statistics": Bad(
        errors.MixedSamplesError,
        ["batch_norm", "module '1'", "Way out: GroupNorm in place of batch norm without running statistics"],
        model=lambda: nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)
        ).eval(),
    ),
    "an output without samples": Bad(
        errors.MixedSamplesError,
        ["without a sample axis", __file__, "layer.weight.exp()", "Return one slice per sample"],
        model=lambda: Net(lambda layer, x: layer.weight.exp()),
        loss=lambda f, y: f.square().sum(),
    ),
    "one sample and its batch norm": Bad(
        errors.FxcurvError,
        ["batch norm in training mode", "eval()"],
        model=batch_norm,
        extensions=[],
        x=inputs()[:1],
        y=classes()[:1],
    ),
    # what an extension needs
    "Jacobian of two outputs": Bad(
        errors.ExtensionError,
        ["Jacobian needs one output", "has 2", "split="],
        model=lambda: Net(lambda layer, x: (layer(x), layer(x).tanh())),
        loss=lambda f, y: F.cross_entropy(f[0] + f[1], y),
        extensions=[Jacobian()],
    ),
    "factors of a norm": Bad(
        errors.ExtensionError,
        ["KFLR", "'1.weight'", "layer_norm", "module '1'", 'others="exact"'],
        model=lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        extensions=[KFLR(others="error")],
    ),
    "averages of a branch": Bad(
        errors.ExtensionError,
        ["KFRA", "branches", __file__, "h + h.tanh()"],
        model=lambda: Net(lambda layer, x: (lambda h: h + h.tanh())(layer(x))),
        extensions=[KFRA()],
    ),
    "empirical columns of another loss": Bad(
        errors.LossError,
        ['fisher="empirical"', "closed form", __file__, "f.cosh().sum()", "Way out"],
        loss=lambda f, y: f.cosh().sum(),
        extensions=[KFAC(fisher="empirical")],
    ),
    "a loss inside of the model": Bad(
        errors.LossError,
        ["DiagGGNExact", "split=", __file__, "layer(x).exp().sum()"],
        model=lambda: Net(lambda layer, x: layer(x).exp().sum()),
        loss=lambda f, y: 2 * f,
        extensions=[DiagGGNExact()],
    ),
    "tokens without positions": Bad(
        errors.LossError, ["no axis of positions", "per token"], loss=F.cross_entropy, options={"sample": "token"}
    ),
    "tokens that the loss joins": Bad(
        errors.LossError,
        ["joins positions", "per token", __file__, "f.mean(1), y"],
        x=inputs()[:, None].expand(N, 2, 4),
        loss=lambda f, y: F.cross_entropy(f.mean(1), y),
        options={"sample": "token"},
    ),
    "factors of tokens": Bad(
        errors.ExtensionError, ["KFLR", 'sample="token"', "Way out"], extensions=[KFLR()], options={"sample": "token"}
    ),
    "a root that is differentiated": Bad(
        errors.ExtensionError,
        ["create_graph=True", __file__, "f.cosh().sum()", "Way out"],
        loss=lambda f, y: f.cosh().sum(),
        extensions=[SqrtGGNExact()],
        call={"create_graph": True},
    ),
    "positive parts that are differentiated": Bad(
        errors.ExtensionError,
        ["create_graph=True with PCHMP", "Way out"],
        extensions=[PCHMP()],
        call={"create_graph": True},
    ),
    "a custom function that is not linear": Bad(
        errors.CustomFunctionError,
        ["'Clipped'", "not linear", __file__, "Clipped.apply(layer(x))", "Way out"],
        model=lambda: Net(lambda layer, x: Clipped.apply(layer(x))),
        extensions=[DiagGGNExact()],
    ),
}


def compiled(*extensions: Any, model: nn.Module | None = None, loss: Any = CE, **options: Any) -> Any:
    return fxcurv.compile(model or mlp(), loss, extensions or [BatchGrad()], **options)


def result(*extensions: Any, **options: Any) -> Any:
    return compiled(*extensions, **options)(inputs(), classes())


def two_passes() -> None:
    model, loss = fxcurv.backpack.extend(mlp()), fxcurv.backpack.extend(nn.CrossEntropyLoss())
    with fxcurv.backpack.backpack(BatchGrad()):
        (loss(model(inputs()), classes()) + loss(model(inputs() + 1), classes())).backward()


def broken_invariant() -> None:
    program = compiled().lower(inputs(), classes())
    del program.results["grad_batch"]["0.weight"]
    passes.verify(program.program, "test")


WRONG_RULE = {torch.ops.aten.tanh.default: Pointwise(d1=lambda x, y: y)}

# what is called wrongly otherwise than in `Bad`: the error, words of its message, and what raises it
CALLS: dict[str, tuple[type[Exception], list[str], Callable[[], Any]]] = {
    "two passes, one field": (errors.FieldError, ["forward more than once", "'0.weight'", "Way out"], two_passes),
    "a wrong rule": (
        errors.SelfCheckError, ["tanh", "module '1'", "report it"], lambda: result(BatchGrad(), rules=WRONG_RULE)
    ),
    "a step on NaN": (
        errors.NonFiniteError, ["NaN", "Way out: skip this batch"],
        lambda: optim.DiagGGN(nn.Linear(4, 3), CE).step((inputs() * torch.nan, classes())),
    ),
    "a broken program": (errors.InternalError, ["after test", "grad_batch"], broken_invariant),
    "params that match nothing": (errors.ArgumentError, ["params='nowhere'", "matches no"], lambda: compiled(params="nowhere")),
    "params of an extension": (
        errors.ExtensionError, ["BatchGrad", "'nowhere'"], lambda: compiled(BatchGrad(params="nowhere"))
    ),
    "params of a wrong type": (errors.ArgumentError, ["params=3", "pass a name"], lambda: compiled(params=3)),
    "memory_budget": (errors.ArgumentError, ["memory_budget='1G'", "number of bytes"], lambda: compiled(memory_budget="1G")),
    "check": (errors.ArgumentError, ["check='no'", "'first'"], lambda: compiled(check="no")),
    "sample": (errors.ArgumentError, ["sample='word'", "'token'"], lambda: compiled(sample="word")),
    "backend": (errors.ArgumentError, ["backend=3", "inductor"], lambda: compiled(backend=3)),
    "mode without a backend": (errors.ArgumentError, ["mode=", "backend="], lambda: compiled(mode="max-autotune")),
    "mc_samples": (errors.ExtensionError, ["mc_samples=0", "positive"], lambda: DiagGGNMC(mc_samples=0)),
    "empirical twice": (errors.ExtensionError, ["one empirical"], lambda: KFAC(mc_samples=2, fisher="empirical")),
    "weight_sharing": (errors.ExtensionError, ["weight_sharing='all'", "expand"], lambda: KFLR(weight_sharing="all")),
    "max_norm": (errors.ExtensionError, ["max_norm=0", "positive"], lambda: ClippedGrad(max_norm=0)),
    "over": (errors.ExtensionError, ["over='layer'", "'param'"], lambda: ClippedGrad(1.0, over="layer")),
    "modify": (errors.ExtensionError, ["modify='flip'", "'abs'"], lambda: PCHMP(modify="flip")),
    "subsampling": (errors.ExtensionError, ["subsampling=[-1]", "from 0"], lambda: BatchGrad(subsampling=[-1])),
    "stage": (errors.ArgumentError, ["after='end'", "one of"], lambda: compiled().lower(inputs(), classes(), after="end")),
    "products, exported": (
        errors.ArgumentError, ["callables", "HMP"], lambda: compiled(HMP()).export(inputs(), classes())
    ),
    "a field of another": (errors.ExtensionError, ["was not asked for"], lambda: result()[DiagGGNExact()]),
    "attached to another model": (errors.ArgumentError, ["the model has no"], lambda: result().attach(nn.Linear(4, 3))),
    "out of another type": (
        errors.ArgumentError, ["out= is a int", "earlier"], lambda: compiled()(inputs(), classes(), out=3)
    ),
    "extend a function": (errors.ArgumentError, ["nn.Module", "function"], lambda: fxcurv.backpack.extend(centred)),
}  # fmt: skip

# wrong arguments of one product
VECTORS: dict[str, tuple[list[str], Callable[[Any], Any]]] = {
    "shape": (["the block of '0.weight' multiplies", "[7]"], lambda r: r.hmp["0.weight"](torch.ones(7))),
    "type": (["'0.weight' are a list", "a tensor"], lambda r: r.hmp["0.weight"]([1.0])),
    "dtype": (["float64"], lambda r: r.hmp["0.weight"](torch.ones(5, 4, dtype=torch.float64))),
    "names": (["the operator"], lambda r: r.hessian @ {"0.weight": torch.ones(5, 4)}),
    "flat": (["the operator is [43, 43]", "[5]"], lambda r: r.hessian @ torch.ones(5)),
    "pickle": (["cannot be pickled"], lambda r: pickle.dumps(r.hmp)),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    """The same of what is called otherwise."""
    error, says, run = CALLS[name]
    with pytest.raises(errors.FxcurvError) as caught:
        run()
    assert type(caught.value) is error
    for words in says:
        assert words in str(caught.value)


def test_vectors() -> None:
    found = result(HMP())
    for says, run in VECTORS.values():
        with pytest.raises(errors.ArgumentError) as caught:
            run(found)
        for words in says:
            assert words in str(caught.value)


# Where their rows are.
OF_SEVERAL_PROCESSES = {errors.RankError: Path(__file__).parents[1] / "distributed" / "test_ranks.py"}


def test_every_error_has_a_row() -> None:
    """A class of `fxcurv.errors` that no row reaches, or a row for the base class only, is no promise."""
    classes = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.FxcurvError)}
    reached = {bad.error for bad in BAD.values()} | {error for error, *_ in CALLS.values()}
    assert classes - {errors.FxcurvError, *OF_SEVERAL_PROCESSES} <= reached
    assert all(e.__name__ in path.read_text() for e, path in OF_SEVERAL_PROCESSES.items())


@pytest.mark.parametrize("name", ["data-dependent branch", "custom function", "input width", "samples centred"])
def test_a_refusal_prints_nothing(name: str, capfd: pytest.CaptureFixture) -> None:
    """All of it is in the message and the exception's cause."""
    with pytest.raises(BAD[name].error):
        call(BAD[name], BAD[name].model())
    assert capfd.readouterr() == ("", "")


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
    pairs = (Dots, EighGGN, GramGGN, GramGrad, NTK, Projected, Quadratic)  # with a test of their own
    found = [e for e in found if isinstance(e, type) and issubclass(e, Extension) and e not in (Extension, *pairs)]
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
