"""Quantities say what passes ask of them, and kinds of columns are registered: nobody matches their class or name."""

import ast
from pathlib import Path

import pytest
import torch
from case_tools import Net
from torch import nn

import fxcurv
from fxcurv import quantity
from fxcurv.errors import ExtensionError
from fxcurv.extensions import BatchGrad, Extension
from fxcurv.ir.emit import emit
from fxcurv.quantity import KINDS, Group, Quantity
from fxcurv.rules.loss import separate
from fxcurv.walks.columns.births import BIRTHS, at_output, born, carry

ROOT = Path(fxcurv.__file__).parent
OWNERS = {"quantity.py", "passes/average.py", "passes/products.py"}


def matched(tree: ast.AST) -> list[ast.Call]:
    """Calls of `isinstance` or `type` on what an extension requires."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.args]
    asks = [c for c in calls if c.func.id in ("isinstance", "type")]
    return [c for c in asks if isinstance(c.args[0], ast.Attribute) and c.args[0].attr == "requires"]


def test_nobody_matches_the_class_of_what_is_required():
    found = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if matched(ast.parse(p.read_text()))}
    assert found <= OWNERS


def test_nobody_compares_the_kind_of_a_group():
    """`group.kind == "mc"`: what differs by kind is its birth or an attribute of `Kind`."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "kind":
                names = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                assert not names & set(KINDS), f"{path}:{node.lineno}"


def test_every_kind_of_a_quantity_is_registered():
    """All groups that quantities give have a title, and those that are carried have a birth on the walk."""
    assert {"exact", "mc", "empirical", "signed", "root", "signs", "identity", "token"} == set(BIRTHS)
    assert set(BIRTHS) | {"gradient", "residual", "none"} == set(KINDS)


def test_a_kind_is_registered_once():
    with pytest.raises(ValueError, match="exact"):
        quantity.kind("exact", "again")


def test_a_new_kind_of_columns_is_one_function(monkeypatch):
    """Twice the identity: a quantity, its kind and an extension, in this test alone."""
    for table in (KINDS, BIRTHS):
        for name in [*table]:
            monkeypatch.setitem(table, name, table[name])

    class Twice(Quantity):
        needs_loss = False

        def groups(self, analysis):
            return [Group("twice")]

    monkeypatch.delitem(KINDS, "twice", raising=False)
    monkeypatch.setitem(BIRTHS, "twice", None)

    @born("twice", at_output, "twice the identity")
    def of_twice(walk, group):
        (head,) = walk.program.heads
        columns = emit(walk.program, twice, head, head.meta["place"])
        carry(walk, group, [head], [columns], None, {})

    class TwiceJacobian(Extension):
        savefield = "twice"
        requires = Twice()

        def extract(self, param):
            return param.contract(power=1)

    try:
        model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
        compiled = fxcurv.compile(model, None, [TwiceJacobian()])
        found = compiled(x).twice["weight"]  # [V, N, *P]
        expected = 2 * torch.einsum("vo,ni->vnoi", torch.eye(2).double(), x)
        torch.testing.assert_close(found, expected)
        assert "twice the identity" in str(compiled.explain(x))
    finally:
        KINDS.pop("twice", None)


def twice(f, place):
    return separate(2 * torch.ones_like(f).unsqueeze(0), place, None)


class Forgets(Extension):
    """Squares of individual gradients, though it asks for the Gauss-Newton's columns."""

    savefield = "forgets"
    requires = quantity.SqrtGGN()

    def extract(self, param):
        return param.contract(power=2, reduce="vn", groups=[quantity.GRADIENT])


class Remembers(Forgets):
    reads_gradients = True


def test_columns_that_nobody_asked_for_are_no_zeros():
    """A scale that enters by another op has the gradient's columns only if an extension wants them."""
    layer = nn.Linear(3, 2).double()
    scale = nn.Parameter(torch.zeros(2).double())
    model = Net(lambda m, x: m.layer(x) * m.scale.exp(), layer=layer, scale=scale)
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])
    with pytest.raises(ExtensionError, match="Forgets contracts .*'gradient' for 'scale'.*reads_gradients"):
        fxcurv.compile(model, nn.CrossEntropyLoss(), [Forgets()])(x, y)
    found = fxcurv.compile(model, nn.CrossEntropyLoss(), [Remembers(), BatchGrad()])(x, y)
    for name, of_samples in found.grad_batch.items():
        torch.testing.assert_close(found.forgets[name], of_samples.square().sum(0))
