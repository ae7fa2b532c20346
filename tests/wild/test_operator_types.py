"""What other libraries ask of a matrix: shape, dtype, device, T, adjoint, products; their estimators take ours as they are."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fxcurv
from fxcurv import linear
from fxcurv.errors import ArgumentError
from fxcurv.extensions import GGNMP, HMP, KFLR
from fxcurv.kronecker import Arrangement, Blocks, Kronecker


@pytest.fixture(scope="module")
def matrices():
    """Name -> a symmetric matrix over 24 parameters, one of each class that others may be given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(10, 3).double(), torch.randint(2, (10,))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [GGNMP(), HMP(), KFLR(joint=True)], check=None)
    result = compiled(x, y)
    return {
        "result.ggn": result.ggn, "result.hessian": result.hessian, "Blocks": Blocks(result.kflr),
        "linear.EmpiricalFisher": linear.EmpiricalFisher(compiled, (x, y)),
    }  # fmt: skip


def test_they_have_what_others_ask_for(matrices):
    for name, a in matrices.items():
        d = a.shape[0]
        assert a.shape == (d, d) and a.dtype == torch.float64 and a.device.type == "cpu", name
        dense = a @ torch.eye(d).double()
        v = torch.arange(d).double()
        torch.testing.assert_close(a.T @ v, dense.T @ v, msg=name)
        torch.testing.assert_close(a.adjoint() @ v, dense.T @ v, msg=name)
        assert np.allclose(a.to_scipy() @ v.numpy(), dense.numpy() @ v.numpy()), name
        assert np.allclose(a.to_scipy() @ np.eye(d), dense.numpy()) and a.to_scipy().dtype == np.float64, name
        reversed_and_fixed = np.arange(d, dtype=float)[::-1]
        reversed_and_fixed.flags.writeable = False
        assert np.allclose(a.to_scipy() @ reversed_and_fixed, (dense @ v.flip(0)).numpy()), name
        assert (a @ dense[:, :0]).shape == (d, 0), name


def test_eigenvalues_by_scipy(matrices):
    from scipy.sparse.linalg import eigsh

    for name in ("result.hessian", "Blocks"):
        a = matrices[name]
        dense = a @ torch.eye(a.shape[0]).double()
        largest = eigsh(a.to_scipy(), k=2, which="LA", return_eigenvectors=False)
        assert np.allclose(np.sort(largest), torch.linalg.eigvalsh(dense)[-2:].numpy()), name


def test_the_estimators_of_curvlinops_take_them(matrices):
    """And give what they give for the dense matrix and the same draws."""
    curvlinops = pytest.importorskip("curvlinops", reason="compares with curvlinops, of the extra `bench`")
    names = ("hutchinson_trace", "hutchpp_trace", "xtrace", "hutchinson_diag", "xdiag", "hutchinson_squared_fro")
    for name, a in matrices.items():
        dense = a @ torch.eye(a.shape[0]).double()
        for estimate in names:
            found = []
            for matrix in (a, dense):
                torch.manual_seed(1)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found.append(getattr(curvlinops, estimate)(matrix, 18))
            torch.testing.assert_close(*found, msg=f"{estimate} of {name}")


def test_scipy_has_no_bfloat16():
    block = Blocks({"bias": Kronecker([torch.eye(2, dtype=torch.bfloat16)], Arrangement((2,), (2,), (0,)))})
    with pytest.raises(ArgumentError, match="no bfloat16"):
        block.to_scipy()
