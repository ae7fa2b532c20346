"""Forward hooks that look at values: every call runs them, on what plain PyTorch would have shown them."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.backpack import backpack, extend
from fxcurv.backpack.extensions import BatchGrad as DropInBatchGrad
from fxcurv.errors import CaptureError, FxcurvError, SelfCheckError
from fxcurv.extensions import BatchGrad
from fxcurv.front.observers import returns_nothing


def cnn() -> nn.Module:
    """What passes rewrite: a rectifier in front of a pooling, ops in place, images in another layout."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 3)]
    return nn.Sequential(*layers).double()


def data(n: int = 5):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


class Recorder:
    """Hooks of all kinds: functions, methods, objects, partial functions, lambdas."""

    def __init__(self):
        self.seen, self.count, self.table = [], 0, {}

    def keep(self, module, args, output):
        self.seen.append((type(module).__name__, *(t.detach().clone() for t in (*args, output))))
        self.count += 1

    def named(self, module, args, kwargs, output):
        self.seen.append((sorted(kwargs), output.detach().clone()))

    def __call__(self, module, args, output):
        self.table["numpy"] = output.detach().numpy().sum()
        self.table["item"] = output.mean().item()

    def put_on(self, model: nn.Module):
        handles = [m.register_forward_hook(self.keep) for m in model]
        handles.append(model[4].register_forward_hook(self.named, with_kwargs=True))
        handles.append(model[1].register_forward_hook(self))
        handles.append(model[3].register_forward_hook(functools.partial(Recorder.keep, self)))
        handles.append(
            model[0].register_forward_hook(lambda m, args, output: self.seen.append(output.detach().sum().item()))
        )
        handles.append(model.register_forward_hook(self.keep))
        return handles


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == pytest.approx(b) if isinstance(a, float) else a == b


def shown(model: nn.Module, *batches) -> Recorder:
    """What plain PyTorch shows the hooks."""
    recorder = Recorder()
    handles = recorder.put_on(model)
    for x, _ in batches:
        model(x)
    for handle in handles:
        handle.remove()
    return recorder


def equal(found: Recorder, wanted: Recorder) -> None:
    assert found.count == wanted.count
    assert same(found.seen, wanted.seen)
    assert same(sorted(found.table.items()), sorted(wanted.table.items()))


def test_every_call_runs_them():
    """Also the first one, which is compared with plain PyTorch, and those of another batch size and of one sample."""
    model, batches = cnn(), [data(), data(), data(3), data(1)]
    wanted, recorder = shown(model, *batches), Recorder()
    recorder.put_on(model)
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    plain = fxcurv.compile(cnn(), F.cross_entropy, [BatchGrad()])
    for x, y in batches:
        result, other = compiled(x, y), plain(x, y)
        assert all(torch.allclose(result.grad_batch[name], g) for name, g in other.grad_batch.items())
    equal(recorder, wanted)
    assert len(compiled.recompiles) == len(plain.recompiles)


def test_they_come_and_go():
    model, (x, y), recorder = cnn(), data(), Recorder()
    compiled = fxcurv.compile(model, F.cross_entropy, [])
    compiled(x, y)
    handles = recorder.put_on(model)
    compiled(x, y)
    for handle in handles:
        handle.remove()
    compiled(x, y)
    equal(recorder, shown(model, (x, y)))
    assert len(compiled.recompiles) == 1 and "hooks" in compiled.recompiles[0]


def test_hooks_of_all_modules():
    model, (x, y), recorder = cnn(), data(), Recorder()
    compiled = fxcurv.compile(model, F.cross_entropy, [])

    def keep(module, args, output):
        recorder.keep(module, args, output)

    with contextlib.ExitStack() as stack:
        stack.callback(nn.modules.module.register_module_forward_hook(keep).remove)
        compiled(x, y)
        seen, recorder.seen = recorder.seen, []
        model(x)
    assert same(seen, recorder.seen) and len(seen) == 6


def test_beside_hooks_that_change_values():
    """In their order: an observer sees what a hook before it made."""
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), []
    x, y = torch.randn(4, 3).double(), torch.randint(0, 4, (4,))
    model[0].register_forward_hook(lambda m, args, output: output * 2)
    model[0].register_forward_hook(lambda m, args, output: seen.append(output))
    fxcurv.compile(model, F.cross_entropy, [])(x, y)
    assert len(seen) == 1 and same(seen[0], 2 * F.linear(x, model[0].weight, model[0].bias))


def test_a_module_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x))

    torch.manual_seed(0)
    model, seen = Twice(), []
    x, y = torch.randn(4, 3), torch.randint(0, 3, (4,))
    model.layer.register_forward_hook(lambda m, args, output: seen.append(output))
    result = fxcurv.compile(model, F.cross_entropy, [])(x, y)
    assert len(seen) == 2 and same(seen[1], result.output) and not same(seen[0], seen[1])


def test_hooks_that_change_values_without_returning_them():
    model, (x, y) = cnn(), data()

    def doubled(module, args, output):
        output.mul_(2)

    handle = model[4].register_forward_hook(doubled)
    with pytest.raises(SelfCheckError, match=r"(?s)hook '.*doubled' of module '4' \(Linear\) returns nothing.*Way out"):
        fxcurv.compile(model, F.cross_entropy, [])(x, y)
    handle.remove()
    large = torch.zeros(())
    model[4].register_forward_hook(lambda m, args, output: output / large if large else None)
    compiled = fxcurv.compile(model, F.cross_entropy, [])
    compiled(x, y)
    large += 1
    with pytest.raises(CaptureError, match="returns one"):
        compiled(x, y)


def test_where_no_hooks_run():
    model, (x, y) = cnn(), data()
    model[1].register_forward_hook(Recorder().keep)
    compiled = fxcurv.compile(model, F.cross_entropy, [])
    with pytest.raises(CaptureError, match="hook 'Recorder.keep'.*exported program"):
        compiled.export(x, y)
    step = torch.compile(lambda x, y: compiled(x, y).loss, backend="eager")
    with pytest.raises(Exception, match="hook 'Recorder.keep'.*torch.compile"):
        step(x, y)


def test_under_the_drop_in():
    model, batches = cnn(), [data(), data(3)]
    wanted, recorder = shown(model, *batches), Recorder()
    handles = recorder.put_on(model)
    extend(model)
    for x, y in batches:
        with backpack(DropInBatchGrad()):
            F.cross_entropy(model(x), y).backward()
    # the model's own hook runs where it is called, by PyTorch
    equal(recorder, wanted)
    assert len(handles) == 10 and all(hasattr(p, "grad_batch") for p in model.parameters())


def test_what_code_returns():
    def early(m, args, output):
        if len(args):
            return
        print(output)

    def some(m, args, output):
        return output if args else None

    assert returns_nothing(early) and returns_nothing(Recorder().keep) and returns_nothing(Recorder())
    assert returns_nothing(functools.partial(early)) and not returns_nothing(some) and not returns_nothing(print)
    assert not returns_nothing(lambda m, args, output: output)


class Scaled(nn.Module):
    """Reads what a hook has written."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.kept = {}
        self.shift = torch.zeros(())

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h) + self.kept["mean"] + self.shift


@pytest.mark.parametrize("kind", ["after", "max norm"])
def test_a_hook_that_writes_what_the_forward_pass_reads_is_no_observer(kind):
    """Its values would be those of an earlier pass."""
    torch.manual_seed(0)
    model = Scaled()
    if kind == "after":
        model.first.register_forward_hook(lambda m, args, output: model.kept.update(mean=output.detach().mean()))
        model(torch.randn(2, 3))  # so that there is an earlier value
    else:
        model.kept["mean"] = torch.zeros(())
    if kind == "max norm":

        def clamped(module, args):
            with torch.no_grad():
                module.weight.clamp_(-0.1, 0.1)

        model.last.register_forward_pre_hook(clamped)
    x, y = torch.randn(4, 3), torch.randint(0, 3, (4,))
    with pytest.raises(FxcurvError):
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(x, y)
    with pytest.raises(FxcurvError):
        own = {name: p.detach() for name, p in model.named_parameters()}
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(x, y, params=own)
