"""Estimators of traces, diagonals and norms, and solvers, of other libraries take matrices of a loader as they are."""

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv import linear

curvlinops = pytest.importorskip("curvlinops", reason="compares with curvlinops, of the extra `estimators`")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ESTIMATES = ("hutchinson_trace", "hutchpp_trace", "xtrace", "hutchinson_diag", "xdiag", "hutchinson_squared_fro")


@pytest.mark.parametrize("name", ["GGN", "Hessian", "EmpiricalFisher", "MCFisher", "NTK"])
def test_of_a_loader(name):
    """They give what they give for the dense matrix and the same draws."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3).double(), torch.randint(2, (12,))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [], check=None)
    matrix = getattr(linear, name)(compiled, list(zip(x.split([7, 5]), y.split([7, 5]), strict=True)))
    dense = matrix @ torch.eye(matrix.shape[0]).double()
    for estimate in ESTIMATES:
        found = []
        for of in (matrix, dense):
            torch.manual_seed(1)
            found.append(getattr(curvlinops, estimate)(of, 12))
        torch.testing.assert_close(*found, msg=estimate)
    from linear_operator.utils.linear_cg import linear_cg

    b = torch.randn(matrix.shape[0], 2).double()
    solved = linear_cg(lambda v: matrix @ v + v, b, tolerance=1e-10, max_iter=50)
    assert (dense @ solved + solved - b).norm() < 1e-4 * b.norm()  # as far as this solver goes
