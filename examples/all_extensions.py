"""All extensions
==============

Every quantity of a linear classifier of images, [512, 784] to 10 classes: by itself, with its kind, all in one backward.

The model has one weight [10, 784] and one bias [10], so that the shapes tell what a quantity is: a number per sample
and parameter entry, a pair of Kronecker factors, a product with as many vectors as were given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import data
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv import kronecker
from fxcurv.backpack import backpack, extend
from fxcurv.backpack.extensions import (
    HBP,
    BackpropStrategy,
    Curvature,
    ExpectationApproximation,
    LossHessianStrategy,
)
from fxcurv.extensions import (
    EKFAC,
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Extension,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)

HESSIAN_BACKPROPAGATION = HBP(
    curv_type=Curvature.GGN,
    loss_hessian_strategy=LossHessianStrategy.SUM,
    backprop_strategy=BackpropStrategy.BATCH_AVERAGE,
    ea_strategy=ExpectationApproximation.BOTEV_MARTENS,
)
KINDS: dict[str, tuple[Extension, ...]] = {
    "first order": (BatchGrad(), Variance(), SumGradSquared(), BatchL2Grad(), ClippedGrad(max_norm=1e-3)),
    "diagonals of curvature": (
        DiagGGNExact(),
        DiagGGNMC(mc_samples=1),
        BatchDiagGGNExact(),
        BatchDiagGGNMC(mc_samples=1),
        DiagHessian(),
        BatchDiagHessian(),
    ),
    "Kronecker factors": (KFAC(mc_samples=1), KFLR(), KFRA(), HESSIAN_BACKPROPAGATION, EKFAC(mc_samples=1)),
    "roots of the Gauss-Newton": (SqrtGGNExact(), SqrtGGNMC(mc_samples=1), Jacobian()),
    "products with curvature matrices": (
        HMP(),
        GGNMP(),
        PCHMP(savefield="pchmp_clip", modify="clip"),
        PCHMP(savefield="pchmp_abs", modify="abs"),
    ),
}
ALL = tuple(e for kind in KINDS.values() for e in kind)
VECTORS = (1, 3)
TOLERANCE = 1e-4  # of the largest entry: single precision, and sums in another order

Fields = dict[str, dict[str, Any]]  # parameter name -> field -> value
Ask = Callable[[tuple[Extension, ...], Tensor, Tensor], Fields]
Request = tuple[str, tuple[Extension, ...]]  # title, what is asked for


def setup() -> tuple[nn.Module, nn.Module]:
    """The same model and loss at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), nn.CrossEntropyLoss()


def by_compile() -> Ask:
    """Fields are those of a compiled program's result."""
    model, lossfunc = setup()

    def ask(extensions: tuple[Extension, ...], x: Tensor, y: Tensor) -> Fields:
        result = fxcurv.compile(model, lossfunc, extensions)(x, y)
        return {
            name: {"grad": gradient, **{e.savefield: result[e][name] for e in extensions}}
            for name, gradient in result.grad.items()
        }

    return ask


def by_backpack() -> Ask:
    """Fields are what a backward pass leaves on the parameters."""
    model, lossfunc = setup()
    model, lossfunc = extend(model), extend(lossfunc)

    def ask(extensions: tuple[Extension, ...], x: Tensor, y: Tensor) -> Fields:
        model.zero_grad()
        loss = lossfunc(model(x), y)
        with backpack(*extensions):
            loss.backward()
        fields = ["grad", *(e.savefield for e in extensions)]
        return {name: {field: getattr(p, field) for field in fields} for name, p in model.named_parameters()}

    return ask


STYLES: dict[str, Callable[[], Ask]] = {"compile": by_compile, "backpack": by_backpack}


def vectors(like: Tensor, count: int) -> Tensor:
    """The same [V, *P] at every call."""
    return torch.rand(count, *like.shape, generator=torch.Generator().manual_seed(count))


def show(fields: Fields) -> None:
    """A line per parameter and field, with its shape; a line per number of vectors for a product."""
    for name, values in fields.items():
        print(name)
        for field, value in values.items():
            if callable(value):
                for vector in (vectors(values["grad"], count) for count in VECTORS):
                    print(f"  .{field + '(vec)':22} {list(value(vector).shape)}")
            elif isinstance(value, Tensor):
                print(f"  .{field:22} {list(value.shape)}")
            else:
                print(f"  .{field:22} {', '.join(str(list(factor.shape)) for factor in value)}")


def tensors(value: Any, like: Tensor) -> list[Tensor]:
    """A field's value as tensors: a product by what it makes of three vectors, and so an eigenbasis, which is not unique."""
    if callable(value):
        return [value(vectors(like, 3))]
    if isinstance(value, kronecker.Eigenbasis):
        return [kronecker.matmul(value, vectors(like, 3))]
    return [value] if isinstance(value, Tensor) else list(value)


def differing(fields: Fields, expected: Fields) -> Iterable[str]:
    """The names of the fields whose values are not those expected."""
    for name, values in fields.items():
        for field, value in values.items():
            like = values["grad"]
            pairs = zip(tensors(value, like), tensors(expected[name][field], like), strict=True)
            if any((a - b).abs().max() > TOLERANCE * b.abs().max() for a, b in pairs):
                yield f"{name}.{field}"


def requests(ways: Sequence[str]) -> list[Request]:
    """What to ask for: every quantity by itself, the quantities of a kind, all."""
    found: dict[str, list[Request]] = {
        "alone": [(f"{type(e).__name__}, .{e.savefield}", (e,)) for e in ALL],
        "several": [(f"several at once: {kind}", extensions) for kind, extensions in KINDS.items()],
        "all": [("every one in a single backward", ALL)],
    }
    return [request for way in found if way in ways for request in found[way]]


def run(style: str, asked: list[Request], x: Tensor, y: Tensor, expected: Fields) -> list[str]:
    """Ask and show; the fields that are not as in `expected`, to which those that it does not have are added."""
    ask, wrong = STYLES[style](), []
    for title, extensions in asked:
        print(f"== {title} ({style})")
        torch.manual_seed(1)  # for what is sampled
        fields = ask(extensions, x, y)
        show(fields)
        for name, values in fields.items():
            known = expected.setdefault(name, {})
            known.update({field: value for field, value in values.items() if field not in known})
        wrong += [f"{field} ({title}, {style})" for field in differing(fields, expected)]
    return wrong


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    data.add_arguments(parser)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--style", choices=("compile", "backpack", "both"), default="both")
    parser.add_argument("--ask", choices=("alone", "several", "all"), nargs="+", default=["alone", "several", "all"])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, show and compare; leave with an error if a quantity depends on what else was asked for, or how."""
    args = arguments(argv)
    x, y = (t[: args.samples] for t in data.load(args))
    expected: Fields = {}
    wrong = []
    for style in STYLES if args.style == "both" else (args.style,):
        wrong += run(style, requests(args.ask), x, y, expected)
    if wrong:
        raise SystemExit(f"not as when first asked for: {', '.join(wrong)}")
    print("every quantity is the same by itself, among several and in the single backward")


if __name__ == "__main__":
    main()
