"""What libraries do in a forward pass: tables that note what they have met, containers of their own, `torch.equal`."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import CaptureError
from fxcurv.extensions import BatchGrad, DiagHessian


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.middle = middle
        self.double()

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def right(model: nn.Module, sizes=(5, 3)) -> fxcurv.api.Compiled:
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    for n in sizes:
        x, y = data(n)
        wanted, found = Oracle(model, F.cross_entropy, x, y).grad_batch(), compiled(x, y).grad_batch
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
    return compiled


# ---- an installed package ------------------------------

PACKAGE = """
    import torch

    _backends, _scale, _latest = {"numpy": "another"}, {"scale": 2.0}, {}


    class Shapes:
        known = {}


    def backend_of(x):
        if type(x) not in _backends:
            _backends[type(x)] = torch
        return _backends[type(x)]


    def squash(x):
        if x.ndim not in Shapes.known:
            Shapes.known[x.ndim] = "met"
        return backend_of(x).tanh(x)


    def doubled(x):
        _scale["scale"] = _scale["scale"] + 1.0
        return x * _scale["scale"]


    class Path(tuple):
        def __len__(self):
            raise NotImplementedError

        def __iter__(self):
            raise NotImplementedError
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A module that lies where installed packages do."""
    folder = tmp_path / "site-packages" / "a_library_of_tests"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(textwrap.dedent(PACKAGE))
    monkeypatch.syspath_prepend(str(folder.parent))
    yield importlib.import_module("a_library_of_tests")
    sys.modules.pop("a_library_of_tests")


def test_a_table_of_what_a_library_has_met(package):
    """It grows in the first trace, as einops' does; entries of others count for nothing."""
    compiled = right(Net(lambda h: package.squash(h)))
    package._backends[int] = torch
    x, y = data()
    compiled(x, y)
    assert len(compiled.recompiles) == 0


def test_a_table_that_changes(package):
    """The value at the next call would depend on how often the forward pass ran."""
    with pytest.raises(CaptureError, match="reads .*_scale.* and changes it"):
        fxcurv.compile(Net(lambda h: package.doubled(h)), F.cross_entropy)(*data())


def test_a_container_that_counts_in_its_own_way(package):
    model = Net(torch.tanh)
    model.path = package.Path((1, 2))
    factors = package.Path((2.0, 3.0))
    model.middle = lambda h: torch.tanh(h) * tuple.__getitem__(factors, 1)
    right(model)


def test_a_module_that_the_forward_pass_imports(tmp_path, monkeypatch):
    """Its own code runs once; what its functions read counts at every call."""
    (tmp_path / "late_module_of_tests.py").write_text(
        "import torch\nscale = 2.0\ncalls = [scale for _ in range(3)]\n\ndef squash(h):\n    return torch.tanh(h) * scale\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def middle(h):
        from late_module_of_tests import squash

        return squash(h)

    model = Net(middle)
    right(model)
    compiled = right(model)
    monkeypatch.setattr(sys.modules["late_module_of_tests"], "scale", 3.0)
    (x, y), wanted = data(), Net(lambda h: torch.tanh(h) * 3.0)
    wanted.load_state_dict(model.state_dict())
    for name, value in Oracle(wanted, F.cross_entropy, x, y).grad_batch().items():
        torch.testing.assert_close(compiled(x, y).grad_batch[name], value, rtol=1e-9, atol=1e-11)
    sys.modules.pop("late_module_of_tests")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_a_scripted_function():
    @torch.jit.script
    def repeated(x, times: int):
        for _ in range(times):
            x = torch.tanh(x) + x
        return x

    right(Net(lambda h: repeated(h, 3)))


# ---- torch.equal ------------------------------


def as_kernels_do(h):
    """Two copies of the same features, scaled alike."""
    a, b = h / 2.0, h / 2.0
    return (a * b if torch.equal(a, b) else a + b).tanh()


def with_another_shape(h):
    return h.sin() if torch.equal(h, h[:, :2]) else h.tanh()


def with_itself(h):
    return h.sin() if h.equal(h) else h.tanh()


def test_equal_values():
    for middle in (as_kernels_do, with_another_shape, with_itself):
        right(Net(middle))


def test_equal_values_of_the_data():
    class Gated(Net):
        def forward(self, x):
            h = self.first(x)
            return self.last(h.tanh() if torch.equal(x, x.abs()) else h.sin())

    model = Gated(None)
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    x, y = data()
    for given in (x, x.abs(), x):
        wanted, found = Oracle(model, F.cross_entropy, given, y).grad_batch(), compiled(given, y).grad_batch
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: h.tanh() if torch.equal(h, h.abs()) else h.sin(),
        lambda h: h.tanh() if torch.equal(h + torch.rand_like(h), h + torch.rand_like(h)) else h.sin(),
        lambda h: h.tanh() if torch.equal(h.clone().mul_(2.0), h.clone()) else h.sin(),
    ],
)
def test_values_that_may_differ(middle):
    with pytest.raises(
        CaptureError, match=r"op equal\n.*test_libraries.py(.|\n)*a value that depends on trained parameters"
    ):
        fxcurv.compile(Net(middle), F.cross_entropy)(*data())


def test_second_derivatives_behind_equal():
    model, (x, y) = Net(as_kernels_do), data()
    found = fxcurv.compile(model, F.cross_entropy, [DiagHessian()])(x, y).diag_h
    for name, value in Oracle(model, F.cross_entropy, x, y, kind="ce").diag_h().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
