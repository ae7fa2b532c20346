"""The interface: arguments, results, purity, state, randomness, and which program a call gets."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv.extensions import (
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
)

N = 6
CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), *(layers or [nn.Tanh()]), nn.Linear(5, 3)).double()


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def gradient(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """By autograd."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def same(a: Any, b: Any) -> bool:
    """Bit-equal."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


class Net(nn.Module):
    """`run(layer, *inputs)` with one linear layer."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.layer, *args, **kwargs)


# --- what goes in


def test_tensor_tuple_list_and_dict() -> None:
    x, y = batch()
    model = Net(lambda layer, a, b: layer(a) + layer(b) ** 2)
    compiled = fxcurv.compile(model, CE, [BatchGrad()])
    expected = gradient(CE(model(x, 2 * x), y), model)
    for inputs in ((x, 2 * x), [x, 2 * x], {"a": x, "b": 2 * x}, {"b": 2 * x, "a": x}):
        result = compiled(inputs, y)
        close(result.grad, expected)
        close({k: g.sum(0) for k, g in result.grad_batch.items()}, expected)


def test_inputs_nest_and_hold_other_values() -> None:
    x, y = batch()
    model = Net(lambda layer, parts, scale, flag: layer(parts["a"][0]) * (scale if flag == "on" else 1))
    compiled = fxcurv.compile(model, CE, [BatchGrad()])
    for scale, flag in ((2.0, "on"), (3.0, "on"), (2.0, "off")):
        inputs = ({"a": [x, None]}, scale, flag)
        close(compiled(inputs, y).grad, gradient(CE(model(*inputs), y), model))


@pytest.mark.parametrize("batch_dim", [1, -2, (1,), [1]])
def test_batch_dim(batch_dim: Any) -> None:
    x, y = torch.randn(5, N, 4, dtype=torch.float64), torch.randint(3, (N,))
    model = Net(lambda layer, x: layer(x).sum(0))
    result = fxcurv.compile(model, CE, [BatchGrad()], batch_dim=batch_dim)(x, y)
    close({k: g.sum(0) for k, g in result.grad_batch.items()}, gradient(CE(model(x), y), model))
    assert result.grad_batch["layer.bias"].shape == (N, 3)


def test_batch_dim_of_targets_follows_the_inputs() -> None:
    """As many steps as samples: the sizes of the targets do not tell which is which."""
    x, y = torch.randn(N, N, 4, dtype=torch.float64), torch.randint(3, (N, N))
    model = Net(lambda layer, x: layer(x))
    loss = lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten())  # noqa: E731
    per_sample = fxcurv.compile(model, loss, [BatchGrad()], batch_dim=1)(x, y).grad_batch["layer.weight"]
    for n in range(N):
        alone = gradient(loss(model(x[:, n : n + 1]), y[:, n : n + 1]) / N, model)["layer.weight"]
        torch.testing.assert_close(per_sample[n], alone)


@pytest.mark.parametrize("batch_dim", [(0, None), {"b": None}, {"a": 0, "b": None}])
def test_input_without_a_batch(batch_dim: Any) -> None:
    x, y = batch()
    shift = torch.randn(3, dtype=torch.float64)
    model = Net(lambda layer, a, b: layer(a) + b)
    inputs = {"a": x, "b": shift} if isinstance(batch_dim, dict) else (x, shift)
    result = fxcurv.compile(model, CE, [BatchGrad()], batch_dim=batch_dim)(inputs, y)
    close({k: g.sum(0) for k, g in result.grad_batch.items()}, gradient(CE(model(x, shift), y), model))


@dataclasses.dataclass
class Labels:
    first: Tensor
    weight: float


def test_targets_of_any_structure() -> None:
    x, y = batch()
    model = mlp()
    losses = {
        "several": (lambda f, a, b: CE(f, a) + CE(f, b), (y, (y + 1) % 3)),
        "dict": (lambda f, t: t["w"] * CE(f, t["y"]), ({"y": y, "w": 2.0},)),
        "dataclass": (lambda f, t: t.weight * CE(f, t.first), (Labels(y, 3.0),)),
        "object": (lambda f, t: CE(f, t.y), (SimpleNamespace(y=y),)),
        "none": (lambda f: f.square().sum(), ()),
        "None": (lambda f, t: f.square().sum(), (None,)),
    }
    for loss, targets in losses.values():
        result = fxcurv.compile(model, loss, [BatchGrad()])(x, *targets)
        expected = gradient(loss(model(x), *targets), model)
        close({k: g.sum(0) for k, g in result.grad_batch.items()}, expected)


def test_values_in_targets_are_not_stale() -> None:
    x, y = batch()
    compiled = fxcurv.compile(mlp(), lambda f, t: t.weight * CE(f, t.first))
    one, two = (compiled(x, Labels(y, weight)) for weight in (1.0, 2.0))
    torch.testing.assert_close(2 * one.loss, two.loss)


@dataclasses.dataclass
class Out:
    logits: Tensor
    extra: Any = None


class Cache:
    """No pytree: what a Hugging Face model returns beside its logits."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys
        self.owner = self


OUTPUTS: dict[str, Any] = {
    "tuple": (lambda h: (h, h.argmax(1)), lambda f: f[0]),
    "dict": (lambda h: {"logits": h, "name": "x"}, lambda f: f["logits"]),
    "dataclass": (lambda h: Out(h), lambda f: f.logits),
    "cache": (lambda h: Out(h, Cache([h * 2])), lambda f: f.logits),
    "namespace": (lambda h: SimpleNamespace(logits=h), lambda f: f.logits),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_keeps_its_structure(name: str) -> None:
    wrap, logits = OUTPUTS[name]
    x, y = batch()
    model = Net(lambda layer, x: wrap(layer(x)))
    result = fxcurv.compile(model, lambda f, y: CE(logits(f), y), [BatchGrad(), DiagGGNExact()])(x, y)
    expected = model(x)
    assert type(result.output) is type(expected)
    torch.testing.assert_close(logits(result.output), logits(expected))
    plain = fxcurv.compile(Net(lambda layer, x: layer(x)), CE, [DiagGGNExact()])
    plain.model.load_state_dict(model.state_dict())
    close(result.diag_ggn_exact, plain(x, y).diag_ggn_exact)
    if name == "cache":
        torch.testing.assert_close(result.output.extra.keys[0], expected.extra.keys[0])
        assert type(result.output.extra.keys[0]) is Tensor


def test_no_loss() -> None:
    x, _ = batch()
    model = mlp()
    result = fxcurv.compile(model, None, [Jacobian()])(x)
    assert result.jacobian["0.weight"].shape == (N, 3, 5, 4)
    assert not hasattr(result, "loss")
    assert not hasattr(result, "grad")


# --- what comes out


def test_result_is_a_pytree() -> None:
    x, y = batch()
    compiled = fxcurv.compile(mlp(), CE, [BatchGrad(), DiagGGNMC()])
    result = compiled(x, y)
    leaves, spec = pytree.tree_flatten(result)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, fxcurv.Result)
    assert again.grad_batch["0.weight"] is result.grad_batch["0.weight"]
    doubled = pytree.tree_map(lambda t: 2 * t, result)
    torch.testing.assert_close(doubled[DiagGGNMC()]["2.bias"], 2 * result.diag_ggn_mc["2.bias"])
    assert {"loss", "output", "grad", "grad_batch", "diag_ggn_mc"} <= set(dir(result))
    assert "grad_batch" in repr(result)
    with pytest.raises(AttributeError, match="no 'variance'.*grad_batch"):
        _ = result.variance


def test_one_class_twice() -> None:
    x, y = batch()
    first, second = BatchGrad(subsampling=[0]), BatchGrad(subsampling=[2, 1], savefield="others")
    result = fxcurv.compile(mlp(), CE, [first, second])(x, y)
    assert result[first] is result.grad_batch
    assert result[second] is result.others
    assert result.others["2.bias"].shape == (2, 3)
    with pytest.raises(fxcurv.errors.ExtensionError, match="not asked for"):
        _ = result[BatchGrad()]
    with pytest.raises(fxcurv.errors.ExtensionError, match="not asked for"):
        _ = result[BatchGrad]


def test_results_are_detached_and_trainable_only() -> None:
    x, y = batch()
    model = mlp()
    model[0].weight.requires_grad_(False)
    result = fxcurv.compile(model, CE, [BatchGrad(), SqrtGGNExact()])(x.requires_grad_(), y)
    assert list(result.grad) == list(result.grad_batch) == ["0.bias", "2.weight", "2.bias"]
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(result))


def test_copies() -> None:
    x, y = batch()
    model = mlp()
    result = fxcurv.compile(model, CE, [BatchGrad()])(x, y)
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), copy.copy(result)):
        assert same(copied.grad_batch, result.grad_batch)
        assert same(copied[BatchGrad()], result.grad_batch)
        with pytest.raises(fxcurv.errors.ArgumentError, match="attach"):
            copied.attach()
        copied.attach(model)
        assert model[0].weight.grad_batch is copied.grad_batch["0.weight"]


def test_compiled_objects_are_copied_without_their_programs() -> None:
    """A copy of the object, also by `pickle`, is of its own model and compiles for itself."""
    compiled = fxcurv.compile(nn.Linear(3, 2), nn.MSELoss(), [BatchGrad()])
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    expected = compiled(x, y).grad_batch["weight"]
    for copied in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert copied.model is not compiled.model
        torch.testing.assert_close(copied(x, y).grad_batch["weight"], expected)
        with torch.no_grad():
            copied.model.weight.zero_()
    torch.testing.assert_close(compiled(x, y).grad_batch["weight"], expected)
    assert copy.copy(compiled).model is compiled.model and not compiled.recompiles


def test_a_loss_that_has_no_name_is_copied_and_not_pickled() -> None:
    compiled = fxcurv.compile(nn.Linear(3, 2), lambda f, y: (f - y).square().mean(), [BatchGrad()])
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    copied = copy.deepcopy(compiled)
    torch.testing.assert_close(copied(x, y).grad, compiled(x, y).grad)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(compiled)


def test_attach() -> None:
    x, y = batch()
    model = mlp()
    result = fxcurv.compile(model, CE, [BatchGrad(), BatchL2Grad()])(x, y)
    assert all(p.grad is None and not vars(p) for p in model.parameters())
    assert result.attach() is result
    assert model[0].weight.batch_l2 is result.batch_l2["0.weight"]
    CE(model(x), y).backward()
    grad = model[0].weight.grad
    torch.testing.assert_close(grad, 2 * result.grad["0.weight"])
    result.attach()
    assert model[0].weight.grad is grad
    torch.testing.assert_close(grad, 3 * result.grad["0.weight"])


def test_attached_gradients_have_memory_of_their_own() -> None:
    x, y = batch()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = fxcurv.compile(model, CE, [BatchGrad()])(x, y)
    before = copy.deepcopy(result.grad)
    result.attach().attach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert same(result.grad, before)


def test_results_are_not_the_parameters() -> None:
    """d/da of sum(a b) is b itself: a step must not change the result."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Product()
    result = fxcurv.compile(model, lambda f: f.sum() + (model.a * model.b).sum())(torch.ones(2, 3))
    before = copy.deepcopy(result.grad)
    result.attach()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert same(result.grad, before)


# --- purity and state


def test_running_statistics_are_updated_once() -> None:
    x, y = batch()
    model = mlp(nn.BatchNorm1d(5))
    reference = copy.deepcopy(model)
    for compiled in (fxcurv.compile(model, CE), fxcurv.compile(model, CE, debug=True)):
        for _ in range(2):
            result = compiled(x, y)
            reference(x)
            assert not hasattr(result, "buffers")
            close(dict(model.named_buffers()), dict(reference.named_buffers()))
    assert model[1].num_batches_tracked == 4


def test_buffers_can_be_returned() -> None:
    x, y = batch()
    model = mlp(nn.BatchNorm1d(5))
    before = copy.deepcopy(model.state_dict())
    result = fxcurv.compile(model, CE, update_buffers=False)(x, y)
    assert same(before, model.state_dict())
    model(x)
    close(dict(sorted(result.buffers.items())), dict(sorted(model.named_buffers())))


def test_nothing_else_changes() -> None:
    x, y = batch()
    model = mlp(nn.BatchNorm1d(5), nn.Dropout()).eval()
    model[1].train()
    model[1].eval()
    model[2].train()
    before = copy.deepcopy(model.state_dict()), x.clone(), y.clone()
    modes = [m.training for m in model.modules()]
    names = [set(vars(m)) for m in model.modules()]
    compiled = fxcurv.compile(model, CE, [BatchGrad(), DiagGGNMC()])
    compiled(x, y)
    assert same(before, (model.state_dict(), x, y))
    assert modes == [m.training for m in model.modules()]
    assert names == [set(vars(m)) for m in model.modules()]
    assert all(p.grad is None and not vars(p) for p in model.parameters())


def test_lstm_keeps_its_weights() -> None:
    """Export assigns and restores its flat weights, with a warning that is none of the user's business."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model = Recurrent().double()
    x, y = torch.randn(3, 2, 4, dtype=torch.float64), torch.randint(3, (3,))
    weights = list(model.rnn._flat_weights)
    close(fxcurv.compile(model, CE)(x, y).grad, gradient(CE(model(x), y), model))
    assert all(a is b for a, b in zip(weights, model.rnn._flat_weights, strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_mode_outside_does_not_matter(context: Any) -> None:
    x, y = batch()
    model = mlp(nn.BatchNorm1d(5).eval())
    compiled = fxcurv.compile(model, CE, [BatchGrad(), DiagGGNMC()])
    expected = gradient(CE(model(x), y), model)
    for _ in range(2):
        with context():
            result = compiled(x.clone(), y.clone())
        close(result.grad, expected)
        assert not any(leaf.requires_grad or leaf.is_inference() for leaf in pytree.tree_leaves(result))
        with context():
            result.attach()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


# --- randomness


def test_seeds() -> None:
    x, y = batch()
    compiled = fxcurv.compile(mlp(), CE, [SqrtGGNMC(mc_samples=2)])
    first = compiled(x, y, seed=3).sqrt_ggn_mc
    assert same(first, compiled(x, y, seed=3).sqrt_ggn_mc)
    assert same(first, compiled(x, y, seed=torch.tensor(3)).sqrt_ggn_mc)
    assert same(first, compiled(x, y, seed=torch.tensor(3, dtype=torch.int32)).sqrt_ggn_mc)
    assert not same(first, compiled(x, y, seed=-4).sqrt_ggn_mc)
    drawn = [compiled(x, y, generator=torch.Generator().manual_seed(k)).sqrt_ggn_mc for k in (0, 0, 1)]
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


def test_manual_seed_repeats() -> None:
    x, y = batch()
    compiled = fxcurv.compile(mlp(), CE, [SqrtGGNMC(mc_samples=2)])
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(compiled(x, y).sqrt_ggn_mc)
        results.append(compiled(x, y).sqrt_ggn_mc)
    assert same(results[0], results[2])
    assert same(results[1], results[3])
    assert not same(results[0], results[1])
    assert not same(results[0], results[4])


def test_the_default_generator_is_left_alone_where_it_is_not_needed() -> None:
    """By tracing, by exact quantities, and by sampled ones with a seed."""
    x, y = batch()
    model = mlp()
    state = torch.get_rng_state()
    fxcurv.compile(model, CE, [BatchGrad(), DiagGGNExact()])(x, y)
    fxcurv.compile(model, CE, [DiagGGNMC()])(x, y, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_one_dropout_mask_for_all() -> None:
    x, y = batch()
    model = mlp(nn.Dropout(0.5))
    compiled = fxcurv.compile(model, CE, [BatchGrad(), SqrtGGNExact()])
    compiled(x, y)
    torch.manual_seed(5)
    result = compiled(x, y)
    torch.manual_seed(5)
    again = compiled(x, y)
    assert same(result, again)
    assert not same(result.grad, compiled(x, y).grad)
    torch.manual_seed(5)
    close(result.grad, gradient(CE(model(x), y), model))
    close({k: g.sum(0) for k, g in result.grad_batch.items()}, result.grad)
    # the gradient lies in the span of the columns only if both saw the same mask
    silent = result.grad_batch["0.bias"] == 0
    assert silent.any()
    assert (result.sqrt_ggn_exact["0.bias"] == 0).all(0).equal(silent)


# --- which program a call gets


def test_weights_are_read_at_each_call() -> None:
    x, y = batch()
    model = mlp()
    compiled = fxcurv.compile(model, CE, [DiagGGNExact()])
    compiled(x, y)
    program = compiled.lower(x, y)
    with torch.no_grad():
        model[0].weight.mul_(2)
    close(compiled(x, y).grad, gradient(CE(model(x), y), model))
    model[2].weight = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
    close(compiled(x, y).grad, gradient(CE(model(x), y), model))
    assert compiled.lower(x, y).program is program.program


def test_the_state_of_the_loss_is_read_at_each_call() -> None:
    x, y = batch()
    model, loss = mlp().float(), nn.CrossEntropyLoss(weight=torch.ones(3))
    compiled = fxcurv.compile(model, loss)
    compiled(x.float(), y)
    loss.weight = torch.tensor([1.0, 2.0, 3.0])
    close(compiled(x.float(), y).grad, gradient(loss(model(x.float()), y), model))
    model.double(), loss.double()
    close(compiled(x, y).grad, gradient(loss(model(x), y), model))


def test_toggles_recompile() -> None:
    x, y = batch()
    model = mlp(nn.BatchNorm1d(5)).eval()
    compiled = fxcurv.compile(model, CE)
    close(compiled(x, y).grad, gradient(CE(model(x), y), model))
    model[0].requires_grad_(False)
    close(compiled(x, y).grad, gradient(CE(model(x), y), model))
    model[0].bias.requires_grad_(True)
    model.train()
    reference = copy.deepcopy(model)
    expected = gradient(CE(reference(x), y), reference)
    close(compiled(x, y).grad, expected)
    assert not torch.equal(model[1].running_mean, torch.zeros(5, dtype=torch.float64))
    model.requires_grad_(False)
    with pytest.raises(fxcurv.errors.ArgumentError, match="no trainable parameter"):
        compiled(x, y)


def test_instance_norm_keeps_its_running_statistics() -> None:
    """The op's schema does not say that it writes to them."""
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Flatten())
    plain, compiled = copy.deepcopy(model), fxcurv.compile(model, nn.MSELoss(), [BatchGrad()])
    for n in (4, 3):
        x, y = torch.randn(n, 1, 5), torch.randn(n, 12)
        close(compiled(x, y).grad, gradient(nn.MSELoss()(plain(x), y), plain))
    for kept, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(kept, expected)
    assert not compiled.recompiles


def test_one_program_for_all_batch_sizes(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    compiled = fxcurv.compile(model, CE, [BatchGrad(), DiagGGNExact()])
    with caplog.at_level(logging.INFO, "fxcurv"):
        for n in (N, 4, 3, 2, 12):
            x, y = batch(n)
            result = compiled(x, y)
            close(result.grad, gradient(CE(model(x), y), model))
            assert result.grad_batch["0.weight"].shape == (n, 5, 4)
    messages = [r.getMessage() for r in caplog.records if r.name == "fxcurv"]
    assert len(messages) == 1
    assert "symbolic" in messages[0]


def test_flattened_targets_follow_the_batch() -> None:
    """Targets [N * T], one per position: their size is a multiple of the batch size."""
    model = Net(lambda layer, x: layer(x))
    loss = lambda f, y: CE(f.flatten(0, 1), y)  # noqa: E731
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    for n in (4, 3, 1, 5):
        x, y = torch.randn(n, 7, 4, dtype=torch.float64), torch.randint(3, (n * 7,))
        result = compiled(x, y)
        close({k: g.sum(0) for k, g in result.grad_batch.items()}, gradient(loss(model(x), y), model))


def test_square_batches_are_told_apart() -> None:
    """Batch sizes that equal other sizes of the data: 3 classes, 4 features."""
    model = mlp()
    loss = nn.MSELoss()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    for n in (3, 4, 6, 2, 1):
        x, y = batch(n)[0], torch.randn(n, 3, dtype=torch.float64)
        result = compiled(x, y)
        close({k: g.sum(0) for k, g in result.grad_batch.items()}, gradient(loss(model(x), y), model))


def test_a_batch_of_one() -> None:
    model = mlp()
    compiled = fxcurv.compile(model, CE, [BatchGrad(), DiagGGNExact()])
    three = compiled(*(parts := batch(3)))
    total = {k: torch.zeros_like(v) for k, v in three.diag_ggn_exact.items()}
    for n in range(3):
        one = compiled(*(part[n : n + 1] for part in parts))
        close({k: v[0] / 3 for k, v in one.grad_batch.items()}, {k: v[n] for k, v in three.grad_batch.items()})
        total = {k: v + one.diag_ggn_exact[k] / 3 for k, v in total.items()}
    close(total, three.diag_ggn_exact)


def test_a_batch_of_one_in_training_mode_is_refused_as_pytorch_refuses_it() -> None:
    """Running statistics of one value would be NaN."""
    x, y = batch(1)
    model = mlp(nn.BatchNorm1d(5))
    with pytest.raises(fxcurv.errors.FxcurvError, match="cannot run on a batch of one"):
        fxcurv.compile(model, CE)(x, y)
    assert model[1].running_var.isfinite().all()


def test_one_model_in_two_compilations() -> None:
    x, y = batch()
    model = mlp()
    first, second = (
        fxcurv.compile(model, CE, [BatchGrad()]),
        fxcurv.compile(model, nn.MSELoss(), [DiagGGNMC()]),
    )
    for _ in range(2):
        close(first(x, y).grad, gradient(CE(model(x), y), model))
        t = torch.randn(N, 3, dtype=torch.float64)
        close(second(x, t).grad, gradient(nn.MSELoss()(model(x), t), model))


def test_frozen_parameters_cost_nothing() -> None:
    """The program of a model with a frozen body has the contractions of its head alone."""
    x, y = batch()
    extensions = [BatchGrad(), DiagGGNExact(), DiagGGNMC()]
    frozen = mlp()
    frozen[0].requires_grad_(False)
    program = fxcurv.compile(frozen, CE, extensions).lower(x, y)
    assert {d.param for d in program.decisions} == {"2.weight", "2.bias"}

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3).double()

        def forward(self, h: Tensor) -> Tensor:
            return self.linear(h)

    alone = fxcurv.compile(Head(), CE, extensions).lower(torch.randn(N, 5, dtype=torch.float64), y)
    count = lambda p: sum(n.op == "call_function" for n in p.graph.nodes)  # noqa: E731
    assert count(program) == count(alone) + 2  # the body's linear and tanh
    for node in program.graph.nodes:
        assert "tanh_backward" not in str(node.target)


def test_autocast() -> None:
    """Casts as a forward and backward would have them; outside of it, none."""
    x, y = batch()
    x, model = x.float(), mlp().float()
    compiled = fxcurv.compile(model, CE, [BatchGrad()])
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = compiled(x, y)
            loss = CE(model(x), y)
        assert result.output.dtype is (torch.bfloat16 if enabled else torch.float32)
        assert result.grad["0.weight"].dtype is torch.float32
        for name, value in gradient(loss, model).items():
            torch.testing.assert_close(result.grad[name], value, rtol=0, atol=4e-3 if enabled else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    x, y = batch()
    model = mlp().to(dtype)
    extensions = [BatchGrad(), DiagGGNExact(), DiagGGNMC(), SqrtGGNExact()]
    result = fxcurv.compile(model, CE, extensions)(x.to(dtype), y)
    for field in ("loss", "output", "grad", "grad_batch", "sqrt_ggn_exact"):
        assert all(leaf.dtype is dtype for leaf in pytree.tree_leaves(getattr(result, field))), field
    for field in ("diag_ggn_exact", "diag_ggn_mc"):  # squares are accumulated in float32 at least
        assert all(leaf.dtype is torch.float32 for leaf in pytree.tree_leaves(getattr(result, field))), field
    assert all(leaf.isfinite().all() for leaf in pytree.tree_leaves(result))
    expected = fxcurv.compile(copy.deepcopy(model).double(), CE, extensions)(x.to(dtype).double(), y)
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for field in ("grad", "diag_ggn_exact"):
        for name, value in getattr(expected, field).items():
            actual = getattr(result, field)[name].double()
            assert (actual - value).norm() <= tolerance * value.norm()


def test_no_grad_may_write_to_what_it_has_made() -> None:
    """The power iteration of spectral norm in training: in place, on values computed from the weight."""
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).double()
    twin = copy.deepcopy(model)
    x, y = batch()
    result = fxcurv.compile(model, CE, [BatchGrad()])(x.double(), y)
    CE(twin(x.double()), y).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(result.grad[name], p.grad)
        torch.testing.assert_close(result.grad_batch[name].sum(0), p.grad)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


class Decayed(nn.Module):
    """Squares of parameters that it keeps in a list, where no module sees them."""

    def __init__(self, parameters):
        super().__init__()
        self.kept = list(parameters)

    def forward(self, output, target):
        return nn.functional.mse_loss(output, target) + sum(p.square().sum() for p in self.kept)


def test_a_loss_may_hold_parameters_in_a_list():
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    loss = Decayed(model.parameters())
    expected = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    result = fxcurv.compile(model, loss, [BatchGrad()])(x, y)
    torch.testing.assert_close(list(result.grad.values()), list(expected))


def test_inputs_that_are_no_leaves():
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3, requires_grad=True) * 2, torch.randn(4, 2)
    result = fxcurv.compile(model, nn.MSELoss())(x, y)
    expected = torch.autograd.grad(nn.MSELoss()(model(x), y), list(model.parameters()))
    torch.testing.assert_close(list(result.grad.values()), list(expected))
