"""Every family of quantities of a row of `packages.py` against the oracle, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from model_checks import ALSO, GROUPS, SEED, Checked, _same_start
from oracle import derivative, plain_mathematics
from oracle_kron import KroneckerOracle
from situations import Situation
from torch import Tensor

import fxcurv
from fxcurv.extensions import HMP, DiagGGNExact, DiagHessian

# of a parameter with more entries, this many are compared where each costs the oracle a derivative of its own
MANY = 8


class Held(Checked):
    """A call of a compiled row with n samples, and the oracle of the same model, inputs and dropout.

    Columns of a root are compared by the square that they are a root of.
    """

    def __init__(self, row: Situation, compiled: fxcurv.Compiled, n: int, training: bool, tolerance: float) -> None:
        exact, x, y = row.built(n, training)
        exact.register_forward_pre_hook(_same_start(exact))
        self.oracle = KroneckerOracle(exact, row.loss, x, y, **row.oracle)
        self.ambiguous, self.tolerance = True, tolerance
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.result = compiled(x, y, seed=7) if y is not None else compiled(x, seed=7)

    def close(self, actual: Tensor, expected: Tensor, what: str, scale: float | None = None) -> None:
        if what.startswith("kfac"):  # the columns were solved for, beside larger ones
            largest = max(v.max().item() for v in self.oracle.diag_ggn_exact().values())
            scale = max(largest, expected.abs().max().item() if scale is None else scale)
        super().close(actual, expected, what, scale)

    def check(self, group: str) -> list[str]:
        own = OWN.get(group)
        if own is None:
            return super().check(group)
        with torch.random.fork_rng(devices=[]), plain_mathematics():
            own(self)
        return []


def check(row: Situation, groups: Sequence[str], sizes: Sequence[int], training: bool, tolerance: float = 1e-8) -> None:
    """Raise where a number is wrong."""
    asked = [e for group in groups for e in [*FAMILIES[group], *ALSO.get(group, [])]]
    model = row.built(2, training)[0]
    compiled = fxcurv.compile(model, row.loss, list(dict.fromkeys(asked)), **row.options)
    for n in sizes:
        held = Held(row, compiled, n, training, tolerance)
        for group in groups:
            held.check(group)


def entries(p: Tensor) -> Tensor:
    """Which of a parameter's entries are compared."""
    return torch.arange(p.numel()) if p.numel() <= MANY else torch.linspace(0, p.numel() - 1, MANY).long()


def diagonal(value: Tensor, p: Tensor) -> Tensor:
    """Of the Hessian of a scalar, at `entries(p)`."""
    (first,) = derivative(value, [p], create_graph=True)
    flat = first.flatten()
    return torch.stack([derivative(flat[i], [p])[0].flatten()[i] for i in entries(p)])


def hessian(held: Held) -> None:
    """`diag_h` of all of L; `diag_h_batch` as J_nT H_n J_n and the Hessian of <s_n, f_n>."""
    o = held.oracle
    hessian_of_batch(held)
    ggn, each = o.diag_ggn_exact_batch(), {}
    for name, p in o.params.items():
        rest = torch.stack([diagonal(f @ s, p) for f, s in zip(o.f, o.s, strict=True)])
        each[name] = rest + ggn[name].flatten(1)[:, entries(p)]
    chosen(held, held.result.diag_h_batch, each, 1, "diag_h_batch")


def chosen(held: Held, found: Any, expected: dict[str, Tensor], start: int, what: str) -> None:
    held.same(
        {name: found[name].flatten(start)[..., entries(p)] for name, p in held.oracle.params.items()}, expected, what
    )


def vectors(o: KroneckerOracle) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, p in o.params.items():
        yield name, p, torch.linspace(-1, 1, 2 * p.numel(), dtype=torch.float64).reshape(2, *p.shape)


def products(held: Held) -> None:
    """Two vectors per parameter: JT H J v from the Jacobian, and a derivative of the gradient times v."""
    o, expected = held.oracle, {}
    for name, _, v in vectors(o):
        j = o.jac[name].flatten(2)
        expected[name] = torch.einsum("ncp,ncmd,mdq,vq->vp", j, o.h_of_all, j, v.flatten(1)).reshape(v.shape)
    found = held.result.ggnmp
    held.same({name: found[name](v) for name, _, v in vectors(o)}, expected, "ggnmp")
    hessian_products(held)


def hessian_products(held: Held) -> None:
    o, expected = held.oracle, {}
    for name, p, v in vectors(o):
        (first,) = derivative(o.total, [p], create_graph=True)
        expected[name] = torch.stack([derivative((first * one).sum(), [p])[0] for one in v])
    found = held.result.hmp
    held.same({name: found[name](v) for name, _, v in vectors(o)}, expected, "hmp")


def ggn_of_batch(held: Held) -> None:
    held.same(held.result.diag_ggn_exact, held.oracle.diag_ggn_exact(), "diag_ggn_exact")


def hessian_of_batch(held: Held) -> None:
    o = held.oracle
    chosen(held, held.result.diag_h, {name: diagonal(o.total, p) for name, p in o.params.items()}, 0, "diag_h")


# what is left of a family where samples meet, or the loss is not convex
LEFT = {"Gauss-Newton": "`DiagGGNExact`", "Hessian": "`DiagHessian`", "products": "`HMP`"}
FAMILIES = {**GROUPS, "`DiagGGNExact`": [DiagGGNExact()], "`DiagHessian`": [DiagHessian()], "`HMP`": [HMP()]}
OWN: dict[str, Callable[[Held], None]] = {
    "Hessian": hessian, "products": products, "`DiagGGNExact`": ggn_of_batch, "`DiagHessian`": hessian_of_batch,
    "`HMP`": hessian_products,
}  # fmt: skip
