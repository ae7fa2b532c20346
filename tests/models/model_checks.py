"""Every quantity of one model against the oracle, in float32 or float64, eval or training mode.

The oracle always computes in float64, on the weights that the model has. In training mode it draws the same dropout:
the generator is seeded before each of its forward passes and before the call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from asked import exact, first, hessian, kronecker, sampled
from case_tools import Case
from oracle import Named
from oracle_kron import NORMS, KroneckerOracle, is_layer, matrix, outer
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fxcurv
from fxcurv.extensions import (
    GGNMP,
    HMP,
    Jacobian,
)

SAMPLES, MAX_NORM, SEED = 2, 0.1, 1

GROUPS: dict[str, list[Any]] = {
    "gradient": [],
    "first order": first(MAX_NORM),
    "Gauss-Newton": exact(),
    "sampled": sampled(SAMPLES),
    "Jacobian": [Jacobian()],
    "Kronecker": kronecker(SAMPLES, others="exact"),
    "Hessian": hessian(),
    "products": [GGNMP(), HMP()],
}
# what a group's check reads besides
ALSO = {"Kronecker": [*GROUPS["sampled"]]}
PLAIN = {
    "gradient": ("grad",),
    "first order": ("grad_batch", "batch_l2", "sum_grad_squared", "variance"),
    "Gauss-Newton": ("diag_ggn_exact", "diag_ggn_exact_batch"),
    "Jacobian": ("jacobian",),
    "Hessian": ("diag_h", "diag_h_batch"),
}


class Checked:
    """A compiled call and the oracle of the same model, inputs and dropout."""

    def __init__(self, case: Case, groups: Sequence[str], dtype: torch.dtype, training: bool, **kwargs: Any) -> None:
        model, loss, inputs, targets = case.build(dtype)
        model.train(training)
        exact = copy.deepcopy(model).double()
        exact.register_forward_pre_hook(_same_start(exact))
        inputs64, targets64 = (tree_map_only(Tensor, _widened, part) for part in (inputs, targets))
        self.oracle = KroneckerOracle(exact, loss, inputs64, targets64, **case.oracle)
        found: list[Any] = []
        for group in groups:
            found += [e for e in [*GROUPS[group], *ALSO.get(group, [])] if e not in found]
        self.ambiguous = bool({"tokens", "ambiguous_columns"} & case.tags)
        # relative to a quantity's largest entry: what the dtype, or a norm in float32, leaves
        self.tolerance = 1e-3 if dtype is torch.float32 else 1e-4 if "float32_inside" in case.tags else 1e-8
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            self.result = fxcurv.compile(model, loss, found, batch_dim=case.batch_dim, **kwargs)(
                inputs, targets, seed=7
            )

    def check(self, group: str) -> list[str]:
        """Raise where a number of the group is wrong; returns the parameters that had nothing to compare with."""
        with torch.random.fork_rng():
            self.oracle.calls  # noqa: B018 - noted on the forward pass that everything else then uses
            for field in PLAIN.get(group, ()):
                self.same(getattr(self.result, field), getattr(self.oracle, field)(), field)
            return CHECKS[group](self) if group in CHECKS else []

    def same(self, actual: dict[str, Any], expected: Named, what: str) -> None:
        assert set(actual) == set(expected), what
        # a variance is the difference of two second moments, which leaves their rounding
        largest = self.oracle.sum_grad_squared() if what == "variance" else expected
        scale = max(v.abs().max().item() for v in largest.values())
        for name, value in expected.items():
            self.close(actual[name], value, f"{what} of {name}", scale)

    def close(self, actual: Tensor, expected: Tensor, what: str, scale: float | None = None) -> None:
        scale = expected.abs().max().item() if scale is None else scale
        torch.testing.assert_close(
            actual.double(), expected, rtol=self.tolerance, atol=self.tolerance * scale + 1e-30,
            msg=lambda m: f"{what}: {m}",
        )  # fmt: skip


def _same_start(model: torch.nn.Module) -> Any:
    """A hook: every forward pass draws the same and starts from the same buffers, which training mode updates."""
    kept = {name: b.clone() for name, b in model.named_buffers()}

    def hook(*_: Any) -> None:
        torch.manual_seed(SEED)
        for name, b in kept.items():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = b.clone()

    return hook


def _widened(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def first_order(c: Checked) -> list[str]:
    c.same(c.result.grad_clipped, c.oracle.grad_clipped(MAX_NORM), "grad_clipped")
    return []


def gram(columns: Named) -> Named:
    """sum_v P P^T per sample of [V, N, *P]."""
    flat = {k: v.double().flatten(2) for k, v in columns.items()}
    return {k: torch.einsum("vnp,vnq->npq", v, v) for k, v in flat.items()}


def gauss_newton(c: Checked) -> list[str]:
    actual, expected = c.result.sqrt_ggn_exact, c.oracle.sqrt_ggn_exact()
    if c.ambiguous:
        c.same(gram(actual), gram(expected), "sqrt_ggn_exact, squared,")
    else:
        c.same(actual, expected, "sqrt_ggn_exact")
    return []


def sampled(c: Checked) -> list[str]:
    """The roots are J^T of columns that are draws as defined, the diagonals are the roots' squares."""
    roots = {k: v.double() for k, v in c.result.sqrt_ggn_mc.items()}
    drawn_columns(c, roots)
    c.same(c.result.diag_ggn_mc_batch, {k: v.square().sum(0) for k, v in roots.items()}, "diag_ggn_mc_batch")
    c.same(c.result.diag_ggn_mc, {k: v.square().sum((0, 1)) for k, v in roots.items()}, "diag_ggn_mc")
    return []


def drawn_columns(c: Checked, roots: Named) -> tuple[Tensor, bool]:
    """The columns [M, N, C] behind a `sqrt_ggn_mc`, and whether no others give the same root.

    For cross-entropy they are those of labels, whatever noise their inverse has.
    """
    columns, only = c.oracle.recover(roots).columns, determined(c.oracle.jac)
    if c.oracle.kind == "ce":
        p, scale, index = c.oracle.ce_scale
        weight = (scale / len(columns)).clamp(min=0).sqrt()
        shaped = columns[:, :, index].reshape(-1, *p.shape)
        labels = (p - shaped / weight[..., None]).nan_to_num().argmax(-1)
        j = torch.cat([v.flatten(2) for v in c.oracle.jac.values()], 2)[:, index].unflatten(1, p.shape[1:])
        wanted = torch.cat([roots[k].flatten(2) for k in c.oracle.jac], 2)
        labels, only = best_labels(p, weight, j, wanted, labels)
        exact = weight[..., None] * (p - torch.nn.functional.one_hot(labels, p.shape[-1]))
        columns = exact.flatten(2)[:, :, index.argsort()]
    expected = {k: torch.einsum("nc...,vnc->vn...", v, columns) for k, v in c.oracle.jac.items()}
    c.same(roots, expected, "sqrt_ggn_mc")
    return columns, only


def best_labels(p: Tensor, weight: Tensor, j: Tensor, wanted: Tensor, labels: Tensor) -> tuple[Tensor, bool]:
    """The labels [M, N, S] whose root is the nearest to `wanted` [M, N, P], and whether no others are as near.

    All are tried if these are few (positions that a model averages may exchange theirs), else each given the others.
    p: probabilities [N, S, C]; weight: of a position's column [N, S]; j: Jacobians of the logits [N, S, C, P]; labels: to begin
    with.
    """
    positions, classes = p.shape[1:]
    one = torch.eye(classes).to(p)
    # the root of every label at every position
    every = torch.einsum("ns,nskp,nslk->nslp", weight, j, p[:, :, None] - one)
    if classes**positions <= 4096:
        tables = torch.cartesian_prod(*[torch.arange(classes)] * positions).reshape(-1, positions)
        roots = sum(every[:, s, tables[:, s]] for s in range(positions))  # [N, tables, P]
        far = torch.stack([(w[:, None] - roots).norm(dim=-1) for w in wanted]) / wanted.norm(dim=-1).max().clamp(
            min=1e-4
        )
        second = far.sort(-1).values[..., 1:2]
        return tables[far.argmin(-1)], bool((second > 1e-4).all())
    for _ in range(5):
        for s in range(positions):
            chosen = torch.stack([every[torch.arange(len(p)), t, labels[:, :, t]] for t in range(positions) if t != s])
            rest = wanted - chosen.sum(0)
            labels[:, :, s] = (rest[:, :, None] - every[:, s]).square().sum(-1).argmin(-1)
    return labels, True


def determined(jacobians: Named) -> bool:
    """Whether columns can be told from the root that they give: every sample's Jacobian has full rank."""
    rows = torch.cat([j.flatten(2) for j in jacobians.values()], 2)
    values = torch.linalg.svdvals(rows)
    return rows.shape[2] >= rows.shape[1] and bool((values[:, -1] > 1e-6 * values[:, 0]).all())


def kronecker(c: Checked) -> list[str]:
    """Factors by the definition: those of layers, of biases, exact blocks; returns weights that are no layer's."""
    roots = {"kflr": c.oracle.sqrt_ggn_exact(), "kfac": {k: v.double() for k, v in c.result.sqrt_ggn_mc.items()}}
    drawn, only = drawn_columns(c, roots["kfac"])
    columns = {"kflr": c.oracle.columns, "kfac": drawn}
    if not only:
        del roots["kfac"]  # several columns give the same root
    # rounding that float32 leaves in all cotangents is large for those of a parameter that hardly matters
    noise = 0.0 if c.tolerance < 1e-6 else max(v.max().item() for v in c.oracle.diag_ggn_exact().values())
    left = []
    for name in c.oracle.params:
        for field, root in roots.items():
            expected = factors(c, name, len(c.result.kflr[name]), columns[field], root[name])
            if expected is None:
                left.append(name)
                break
            for found, wanted in zip(getattr(c.result, field)[name], expected, strict=True):
                wanted = wanted.diagonal() if found.ndim == 1 else wanted
                c.close(found, wanted, f"{field} of {name}", max(noise, wanted.abs().max().item()))
        else:
            if "kfac" in roots:
                eigenbasis(c, name, roots["kfac"][name])
    return left


def factors(c: Checked, name: str, count: int, columns: Tensor, root: Tensor) -> tuple[Tensor, ...] | None:
    """The `count` factors of a parameter, from columns and the root that they give; None: no layer that has them."""
    path, leaf = held(c, name)
    calls = c.oracle.calls.get(path, [])
    if calls and all(len(y) == len(c.oracle.f) for _, y in calls):
        if is_layer(c.oracle.model.get_submodule(path)) and (leaf == "bias" or count == 2):
            return c.oracle.factors(path, columns, "backpack")[:count]
        if leaf == "bias":  # of a norm
            return (outer(torch.cat(c.oracle.columns_at(path, columns), 2)),)
    exact = count == 1 and "bias" not in name.rpartition(".")[2]
    return (outer(root.flatten(2)),) if exact else None


def held(c: Checked, name: str) -> tuple[str, str]:
    """The layer or norm that calls a parameter its weight or bias, which others may hold first."""
    p = c.oracle.params[name]
    for path, module in c.oracle.model.named_modules():
        if is_layer(module) or isinstance(module, NORMS):
            for leaf in ("weight", "bias"):
                if getattr(module, leaf, None) is p:
                    return path, leaf
    return "", ""


def eigenbasis(c: Checked, name: str, root: Tensor) -> None:
    """Orthogonal, diagonalises KFAC's factors, and its moments are those of P in it."""
    *bases, moments = (t.double() for t in c.result.ekfac[name])
    for q, factor in zip(bases, c.result.kfac[name], strict=True):
        if q.ndim == 1:  # an embedding's second side is diagonal already
            continue
        c.close(q.T @ q, torch.eye(len(q), dtype=q.dtype), f"basis of {name}")
        inside = q.T @ factor.double() @ q
        off = inside - torch.diag(inside.diagonal())
        assert off.abs().max() <= c.tolerance * (inside.abs().max() + 1e-30), f"basis of {name}"
    if len(bases) == 1:
        p = root.flatten(2) @ bases[0]
    else:
        layer = c.oracle.model.get_submodule(held(c, name)[0])
        turn = bases[1] if bases[1].ndim == 2 else torch.eye(len(bases[1]), dtype=root.dtype)
        p = bases[0].T @ matrix(layer, root) @ turn
    c.close(moments.flatten(), p.square().sum((0, 1)).flatten(), f"ekfac of {name}")


def products(c: Checked) -> list[str]:
    for field, blocks in (("ggnmp", c.oracle.ggn()), ("hmp", c.oracle.hessian())):
        dtype = c.result.loss.dtype
        dtype = next(iter(c.result.grad.values())).dtype if dtype is not torch.float64 else dtype
        found = {}
        for name, p in c.oracle.params.items():
            eye = torch.eye(p.numel(), dtype=dtype).reshape(p.numel(), *p.shape)
            found[name] = getattr(c.result, field)[name](eye).reshape(p.numel(), p.numel())
        c.same(found, blocks, field)
    return []


CHECKS: dict[str, Callable[[Checked], list[str]]] = {
    "first order": first_order, "Gauss-Newton": gauss_newton, "sampled": sampled, "Kronecker": kronecker,
    "products": products,
}  # fmt: skip
