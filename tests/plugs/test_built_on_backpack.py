"""Packages that are built on BackPACK, through `fxcurv.backpack.install()`: each in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.slow

BEGIN = """
    import fxcurv.backpack
    fxcurv.backpack.install()
    import torch
    from torch import nn
    from backpack import backpack, extend
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 3).double(), torch.randint(0, 3, (5,))
    lossfunc, plain = extend(nn.CrossEntropyLoss()), nn.CrossEntropyLoss()
"""

VIVIT = """
    import vivit
    from vivit.extensions.hooks import GramBatchGrad, GramSqrtGGNExact
    from vivit.extensions.secondorder.vivit import ViViTGGNExact
    from backpack.extensions import BatchGrad, SqrtGGNExact
    result = fxcurv.compile(model, plain, [BatchGrad(), SqrtGGNExact()])(x, y)
    gradients = torch.cat([g.flatten(1) for g in result.grad_batch.values()], 1)
    roots = torch.cat([r.flatten(2) for r in result.sqrt_ggn_exact.values()], 2).flatten(0, 1)
    extend(model)
    hook = GramBatchGrad(free_grad_batch=True)
    with backpack(BatchGrad(), extension_hook=hook):
        lossfunc(model(x), y).backward()
    torch.testing.assert_close(hook.get_result(), gradients @ gradients.T)
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    with backpack(ViViTGGNExact()):
        lossfunc(model(x), y).backward()
    gram = sum(p.vivit_ggn_exact["gram_mat"]() for p in model.parameters()).reshape(15, 15)
    torch.testing.assert_close(torch.linalg.eigvalsh(gram), torch.linalg.eigvalsh(roots @ roots.T))
    computation = vivit.EigvalshComputation()
    groups = [{"params": list(model.parameters())}]
    torch.Tensor.symeig = lambda t, eigenvectors=False: (torch.linalg.eigvalsh(t), None)  # which PyTorch had
    with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook(groups)):
        lossfunc(model(x), y).backward()
    torch.testing.assert_close(computation.get_result(groups[0]), torch.linalg.eigvalsh(roots @ roots.T))
"""

COCKPIT = """
    import cockpit
    import cockpit.utils.schedules
    from cockpit import quantities
    from backpack.extensions import DiagHessian
    model, x = model.float(), x.float()  # HessMaxEV compares with a float32
    model, optimizer = extend(model), torch.optim.SGD(model.parameters(), lr=0.1)
    individual = nn.CrossEntropyLoss(reduction="none")
    every = cockpit.utils.schedules.linear(1)
    kinds = [quantities.GradNorm, quantities.NormTest, quantities.GradHist1d, quantities.HessMaxEV]
    asked = [quantities.HessTrace(every, curvature="diag_h"), *(kind(every) for kind in kinds)]
    watched = cockpit.Cockpit(model.parameters(), quantities=asked)
    traces = []
    for step in range(2):
        optimizer.zero_grad()
        outputs = model(x)
        loss, losses = lossfunc(outputs, y), individual(outputs, y)
        info = {"batch_size": 5, "individual_losses": losses, "loss": loss, "optimizer": optimizer}
        with watched(step, info=info):
            loss.backward(create_graph=watched.create_graph(step))
        named = {name: p.detach() for name, p in model.named_parameters()}
        of = lambda p: plain(torch.func.functional_call(model, p, (x,)), y)
        hessian = torch.func.hessian(of)(named)
        traces.append(sum(hessian[n][n].reshape(p.numel(), -1).trace().item() for n, p in named.items()))
        optimizer.step()
    found = watched.get_output()
    for step, trace in enumerate(traces):
        assert abs(sum(found[step]["HessTrace"]) - trace) < 1e-4 * abs(trace)
    assert set(found[1]) >= {"GradNorm", "NormTest", "GradHist1d", "HessMaxEV"}
"""


@pytest.mark.parametrize("name, script", [("vivit", VIVIT), ("cockpit", COCKPIT)], ids=["vivit", "cockpit"])
def test_package(name, script):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install fxcurv[plugs]")
    code = textwrap.dedent(BEGIN) + textwrap.dedent(script)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
