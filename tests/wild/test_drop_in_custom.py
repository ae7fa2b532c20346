"""Code that is written for BackPACK: its import name, extensions and hooks per module, chains of models."""

from __future__ import annotations

import copy
import gc
import importlib
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch import fx, nn

import fxcurv
from fxcurv.backpack import backpack, extend
from fxcurv.backpack.core.derivatives import LinearDerivatives
from fxcurv.backpack.custom_module.graph_utils import BackpackTracer
from fxcurv.backpack.custom_module.slicing import Slicing
from fxcurv.backpack.extensions import BatchGrad, DiagGGNExact, DiagHessian, SqrtGGNExact
from fxcurv.backpack.extensions.module_extension import (
    FirstOrderBackpropExtension,
    FirstOrderModuleExtension,
    MatToJacMat,
    ModuleExtension,
    SecondOrderBackpropExtension,
)
from fxcurv.backpack.utils.examples import autograd_diag_ggn_exact
from fxcurv.backpack.utils.subsampling import subsample
from fxcurv.errors import ExtensionError, LossError


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6)).double()


def data(n: int = 5):
    torch.manual_seed(1)
    return torch.randn(n, 3).double(), torch.randint(0, 6, (n,))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---- the name ------------------------------

IMPORTS = """
    import sys
    import fxcurv.backpack
    fxcurv.backpack.install()
    fxcurv.backpack.install()
    import backpack, backpack.context, backpack.utils.examples
    from backpack import disable, extensions, memory_cleanup
    from backpack.core.derivatives.basederivatives import BaseDerivatives
    from backpack.core.derivatives.convnd import weight_jac_t_save_memory
    from backpack.custom_module.branching import Parallel
    from backpack.extensions import BatchGrad
    from backpack.extensions.backprop_extension import BackpropExtension
    from backpack.extensions.firstorder.base import FirstOrderModuleExtension
    from backpack.extensions.mat_to_mat_jac_base import MatToJacMat
    from backpack.extensions.secondorder.base import SecondOrderBackpropExtension
    from backpack.extensions.secondorder.diag_ggn import DiagGGNExact
    from backpack.extensions.secondorder.hbp import LossHessianStrategy
    from backpack.extensions.secondorder.sqrt_ggn import activations, losses
    from backpack.hessianfree.hvp import hessian_vector_product
    from backpack.utils.subsampling import subsample
    assert backpack is fxcurv.backpack and backpack.context is sys.modules["fxcurv.backpack.context"]
    assert backpack.context.__name__ == backpack.context.__spec__.name == "fxcurv.backpack.context"
    assert DiagGGNExact is fxcurv.backpack.extensions.DiagGGNExact and LossHessianStrategy.EXACT == "exact"
    assert isinstance(BatchGrad(), BackpropExtension) and activations.SqrtGGNReLU().params == ()
    with weight_jac_t_save_memory(True):
        pass
    try:
        import backpack.core.nothing
    except ModuleNotFoundError as error:
        assert "Way out" in str(error) and "backpack.core.nothing" in str(error)
    else:
        raise AssertionError("imported")
    try:
        from backpack.core.derivatives.linear import nothing
    except ImportError:
        pass
    fxcurv.backpack.uninstall()
    assert "backpack" not in sys.modules and "fxcurv.backpack" in sys.modules
    import types
    sys.modules["backpack"] = types.ModuleType("backpack")
    try:
        fxcurv.backpack.install()
    except ImportError as error:
        assert "imported already" in str(error) and "Way out" in str(error)
    else:
        raise AssertionError("installed over BackPACK")
"""


def test_backpacks_name():
    """In a process of its own: what is imported stays imported."""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(IMPORTS)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_subsample():
    t = torch.arange(12).reshape(3, 4)
    assert torch.equal(subsample(t, 1, [3, 0]), t[:, [3, 0]]) and subsample(t, 0, None) is t


def test_the_diagonal_by_autograd():
    model, (x, y) = mlp(), data()
    want = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact()])(x, y).diag_ggn_exact
    want = torch.cat([t.flatten() for t in want.values()])
    close(autograd_diag_ggn_exact(x, y, model, nn.CrossEntropyLoss(), idx=[0, 7, 40]), want[[0, 7, 40]])


# ---- hooks and extensions per module ------------------------------


def test_hooks_see_inputs_and_outputs():
    model, (x, y) = mlp(), data()
    values, seen = [x], {}
    for layer in model:
        values.append(layer(values[-1]).detach())

    def hook(module):
        if module is loss:
            close(module.input0, values[-1])
            assert torch.equal(module.input1, y)
        else:
            seen[list(model).index(module)] = module.input0, module.output

    loss = extend(nn.CrossEntropyLoss())
    extend(model)
    for _ in range(2):
        seen.clear()
        with backpack(BatchGrad(), extension_hook=hook):
            loss(model(x), y).backward()
        assert sorted(seen) == [0, 1, 2] and not any(t.requires_grad for pair in seen.values() for t in pair)
        for k, (given, made) in seen.items():
            close(given, values[k])
            close(made, values[k + 1])
    assert not any(hasattr(m, name) for m in model for name in ("input0", "output"))


def test_what_a_hook_deletes_is_freed():
    model, (x, y), held, alive = extend(mlp()), data(), [], []

    def hook(module):
        alive.append(sum(r() is not None for r in held))
        for p in module.parameters():
            held.append(weakref.ref(p.grad_batch))
            del p.grad_batch

    with backpack(BatchGrad(), extension_hook=hook):
        nn.functional.cross_entropy(model(x), y).backward()
    assert alive == [0, 0, 0] and len(held) == 4


class LinearNorms(FirstOrderModuleExtension):
    """Squared norms of individual gradients, [N]."""

    def __init__(self):
        super().__init__(params=["weight", "bias"])

    def weight(self, ext, module, g_inp, g_out, backproped):
        assert backproped is None
        (g,) = g_out
        assert module.output.shape == g.shape and (g_inp[0] is None or g_inp[0].shape == module.input0.shape)
        return module.input0.square().sum(1) * g.square().sum(1)

    def bias(self, ext, module, g_inp, g_out, backproped):
        return g_out[0].square().sum(1)


class Norms(FirstOrderBackpropExtension):
    def __init__(self, **options):
        super().__init__("norms", {nn.Linear: LinearNorms()}, **options)


def test_an_extension_of_the_first_order():
    model, (x, y) = mlp(), data()
    want = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()])(x, y).grad_batch
    loss = extend(nn.CrossEntropyLoss())
    with backpack(Norms(), BatchGrad()):
        (2 * loss(extend(model)(x), y)).backward()
    for name, p in model.named_parameters():
        close(p.norms, (2 * want[name]).square().flatten(1).sum(1))
        close(p.grad_batch, 2 * want[name])


class RootLinear(MatToJacMat):
    """Columns of the Gauss-Newton's root: by hand for the weight, by BackPACK's derivatives for the bias."""

    def __init__(self):
        super().__init__(LinearDerivatives(), params=["weight", "bias"])

    def weight(self, ext, module, g_inp, g_out, backproped):
        return torch.einsum("vno,ni->vnoi", backproped, subsample(module.input0, 0, ext.get_subsampling()))

    def bias(self, ext, module, g_inp, g_out, backproped):
        samples = ext.get_subsampling()
        return self.derivatives.param_mjp(
            "bias", module, g_inp, g_out, backproped, sum_batch=False, subsampling=samples
        )


class Root(SecondOrderBackpropExtension):
    def __init__(self, subsampling=None):
        super().__init__("root", {nn.Linear: RootLinear()}, subsampling=subsampling)


@pytest.mark.parametrize("samples", [pytest.param(None, marks=pytest.mark.slow), [3, 1]], ids=["all", "some"])
def test_an_extension_of_the_second_order(samples):
    model, (x, y), loss = mlp(), data(), extend(nn.CrossEntropyLoss())
    want = fxcurv.compile(model, nn.CrossEntropyLoss(), [SqrtGGNExact(subsampling=samples)])(x, y).sqrt_ggn_exact
    extend(model)
    with backpack(Root(samples)):
        loss(model(x), y).backward()
    for name, p in model.named_parameters():
        gram = lambda t: torch.einsum("vnp,vmq->nmpq", t.flatten(2), t.flatten(2))  # noqa: E731  # roots are not unique
        close(gram(p.root), gram(want[name]))


def test_module_extensions_of_ours():
    """In place of what the compiler says of that class, and with nothing asked of modules without parameters."""
    model, (x, y) = mlp(), data()

    class Diagonal(ModuleExtension):
        def __init__(self):
            super().__init__(params=["bias"])

        def bias(self, ext, module, g_inp, g_out, backproped):
            return backproped.square().sum((0, 1))

    extension = DiagGGNExact()
    extension.set_module_extension(nn.Linear, Diagonal())
    with pytest.raises(ValueError, match="overwrite"):
        extension.set_module_extension(nn.Linear, Diagonal())
    want = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact()])(x, y).diag_ggn_exact
    with backpack(extension):
        extend(nn.CrossEntropyLoss())(extend(model)(x), y).backward()
    for name, p in model.named_parameters():
        close(p.diag_ggn_exact, want[name])
    with pytest.raises(ExtensionError, match="drop-in"):
        fxcurv.compile(mlp(), nn.CrossEntropyLoss(), [extension])


def test_modules_without_an_extension():
    from fxcurv.backpack.extensions import carried

    x, y = data()
    both = extend(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 6)).double())

    def run(extension):
        with backpack(extension):
            nn.functional.cross_entropy(both(x), y).backward()

    with pytest.warns(UserWarning, match="LayerNorm"):
        run(Norms())
    with pytest.raises(ExtensionError, match="no module extension for LayerNorm.*Way out"):
        run(Norms(fail_mode="ERROR"))
    silent = Norms(fail_mode="SILENT")
    run(silent)
    silent.set_module_extension(nn.LayerNorm, carried.SqrtGGNLayerNorm())
    with pytest.raises(ExtensionError, match="SqrtGGNLayerNorm.*Way out"):
        run(silent)
    with pytest.raises(NotImplementedError, match="no method weight"):
        ModuleExtension(params=["weight"])


# ---- chains, and losses of parts of the output ------------------------------


def parts():
    torch.manual_seed(0)
    body, middle = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    return body.double(), middle.double(), nn.Linear(4, 6).double()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_models_in_a_chain(count):
    first, second, last = parts()
    models = [first, second, last] if count == 3 else [nn.Sequential(first, second), last]
    whole, (x, y) = nn.Sequential(*models), data()
    asked = [DiagGGNExact(), DiagHessian(), BatchGrad()]
    want = fxcurv.compile(copy.deepcopy(whole), nn.CrossEntropyLoss(), asked)(x, y)
    loss = extend(nn.CrossEntropyLoss())
    for model in models:
        extend(model)
    for _ in range(2):
        whole.zero_grad()
        out = x
        for model in models:
            out = model(out)
        with backpack(*asked):
            (3 * loss(out, y)).backward()
        for name, p in whole.named_parameters():
            close(p.grad, 3 * want.grad[name])
            close(p.grad_batch, 3 * want.grad_batch[name])
            close(p.diag_ggn_exact, 3 * want.diag_ggn_exact[name])
            close(p.diag_h, 3 * want.diag_h[name])
    gone = [weakref.ref(model) for model in models]
    del whole, model, models, first, second, last, out, p
    gc.collect()
    assert all(ref() is None for ref in gone), "a chain keeps no model alive"


def test_chains_that_are_refused():
    body, _, head = parts()
    body, head, loss, (x, y) = extend(body), extend(head), extend(nn.CrossEntropyLoss()), data()
    f = body(x)
    with backpack(DiagGGNExact()), pytest.raises(LossError, match="Sequential.*by another way.*Way out"):
        (loss(head(f), y) + f.square().sum()).backward()
    f, other = body(x), extend(copy.deepcopy(head))
    with backpack(DiagGGNExact()), pytest.raises(LossError, match="several extended models"):
        (loss(head(f), y) + extend(nn.CrossEntropyLoss())(other(f), y)).backward()


class Of(nn.Module):
    def __init__(self, model, fn):
        super().__init__()
        self.model, self.fn = model, fn

    def forward(self, x):
        return self.fn(self.model(x))


READ = {
    "slicing": (Slicing((slice(None), slice(1, 4))), lambda n: torch.randint(0, 3, (n,)), nn.CrossEntropyLoss()),
    "one entry": (lambda f: f[:, 2], lambda n: torch.randn(n).double(), nn.MSELoss()),
    "copied": (
        lambda f: f.view(-1, 2, 3).transpose(1, 2).reshape(-1, 2), lambda n: torch.randint(0, 2, (3 * n,)), nn.CrossEntropyLoss(),
    ),
    "a list of columns": (lambda f: f[:, [4, 0]], lambda n: torch.randn(n, 2).double(), nn.MSELoss()),
    "joined": (
        lambda f: torch.cat([f[:, 4:], f.flip(1)[:, 3:5]], 1), lambda n: torch.randint(0, 3, (n,)), nn.CrossEntropyLoss(),
    ),
    "one each": (
        lambda f: f.gather(1, torch.arange(len(f))[:, None]), lambda n: torch.randn(n, 1).double(), nn.MSELoss(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [c if c in ("copied", "joined") else pytest.param(c, marks=pytest.mark.slow) for c in READ]
)
def test_losses_of_entries_of_the_output(case):
    fn, targets, lossfunc = READ[case]
    model, (x, _) = mlp(), data()
    t = targets(len(x))
    want = fxcurv.compile(Of(copy.deepcopy(model), fn), lossfunc, [DiagGGNExact()])(x, t).diag_ggn_exact
    with backpack(DiagGGNExact()):
        extend(lossfunc)(fn(extend(model)(x)), t).backward()
    for name, p in model.named_parameters():
        close(p.diag_ggn_exact, want[f"model.{name}"])


def test_samples_that_change_places_are_refused():
    model, (x, y) = extend(mlp()), data()
    with backpack(DiagGGNExact()), pytest.raises(LossError, match="no extended loss read it"):
        extend(nn.CrossEntropyLoss())(model(x).flip(0), y).backward()
    with backpack(DiagGGNExact()), pytest.raises(LossError, match="no extended loss read it"):
        extend(nn.CrossEntropyLoss())(model(x)[:3], y[:3]).backward()
    with backpack(DiagGGNExact()), pytest.raises(LossError, match="each sample's together and none twice"):
        extend(nn.CrossEntropyLoss())(model(x)[:, [0, 1, 1]], y % 3).backward()


# ---- traces of an extended model ------------------------------


def test_traces_take_the_plain_forward():
    model, (x, y) = mlp(), data()
    want = model(x).detach()
    extend(model)
    close(fx.symbolic_trace(model)(x), want)
    graph = BackpackTracer().trace(nn.Sequential(model, Slicing((slice(None), 0))))
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0.0", "0.1", "0.2", "1"]
    close(torch.func.vmap(lambda v: model(v[None])[0])(x), want)
    params = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(params)
    assert grads["0.weight"].shape == (4, 3)
    close(fxcurv.compile(nn.Sequential(model), nn.CrossEntropyLoss())(x, y).output, want)


def test_importing_again_gives_the_same_modules():
    assert importlib.import_module("fxcurv.backpack.extensions.carried").Anything().params == ()
