"""Steps of EKFAC, of KFAC with joint blocks and of conjugate gradients by dense algebra; states; training on digits."""

import copy
import io
import pickle

import pytest
import torch
from oracle import Oracle
from sklearn.datasets import load_digits
from torch import nn

import fxcurv
from fxcurv import kronecker
from fxcurv.errors import ArgumentError, NonFiniteError
from fxcurv.kronecker import Within
from fxcurv.optim import EKFAC, KFAC, DiagGGN, NaturalGradientCG, conjugate_gradients

LOSS = nn.CrossEntropyLoss()


def case(n=12):
    """More classes than features, so that no block has a null space of which any basis is as good."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 7)).double()
    x = torch.randn(n, 4).double()
    return model, x, (x @ torch.randn(4, 7).double()).argmax(1)


def basis_of(factors):
    """(the eigenvectors of a block, dense; a function that puts vectors of its parameters into its order)."""
    q = kronecker.eigenbasis(factors)
    turn = torch.kron(q[0], q[1]) if len(q) == 3 else q[0]
    return turn, factors.arrangement.matrix


def averaged(before, new, decay):
    return [decay * (before[k] if before else 0) + (1 - decay) * t for k, t in enumerate(new)]


@pytest.mark.parametrize("joint", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ekfac_steps_are_those_of_the_formula(joint):
    """Two bases, the average of the moments going from one to the other."""
    model, x, y = case()
    twin, _, _ = case()
    known = {"lr": 0.2, "momentum": 0.5, "damping": 0.1, "weight_decay": 0.01, "decay": 0.7, "basis_interval": 2}
    optimizer = EKFAC(model, LOSS, **known, fisher="empirical", joint=joint, check=None)
    extension = fxcurv.extensions.KFAC(fisher="empirical", weight_sharing="expand", joint=joint)
    compiled = fxcurv.compile(twin, LOSS, [extension], check=None)
    named, factors, turns, moments, momentum = dict(twin.named_parameters()), {}, {}, {}, {}
    for step in range(4):
        optimizer.step((x, y))
        oracle = Oracle(twin, LOSS, x, y, kind="ce")
        batch, grads = oracle.grad_batch(), oracle.grad()
        for name, new in compiled(x, y).kfac.items():
            if isinstance(new, Within):
                continue
            own = list(new.arrangement.named(name))
            pick = lambda of, own=own: tuple(of[n] for n in own) if len(own) > 1 else of[own[0]]  # noqa: E731
            if step % 2 == 0:
                factors[name] = averaged(factors.get(name), new, 0.7)
                unbiased = [f / (1 - 0.7 ** (step // 2 + 1)) for f in factors[name]]
                turn, _ = basis_of(kronecker.Kronecker(unbiased, new.arrangement))
                if name in turns:
                    moments[name] = ((turn.T @ turns[name]) @ moments[name].diag() @ (turns[name].T @ turn)).diagonal()
                turns[name] = turn
            rows = new.arrangement.matrix(pick(batch)).flatten(1) * len(x) ** 0.5  # the empirical columns: c = 1/N
            moments[name] = 0.7 * moments.get(name, 0) + 0.3 * (rows @ turns[name]).square().sum(0)
            g = new.arrangement.matrix(pick({n: grads[n] + 0.01 * p.detach() for n, p in named.items()}))
            inside = (turns[name].T @ g.flatten()) / (moments[name] / (1 - 0.7 ** (step + 1)) + 0.1)
            found = new.arrangement.vector((turns[name] @ inside).reshape(g.shape))
            for n, direction in zip(own, found if len(own) > 1 else (found,), strict=True):
                momentum[n] = direction if n not in momentum else 0.5 * momentum[n] + direction
                with torch.no_grad():
                    named[n] -= 0.2 * momentum[n]
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_kfac_steps_with_joint_blocks():
    model, x, y = case()
    twin, _, _ = case()
    optimizer = KFAC(model, LOSS, lr=0.3, momentum=0, damping=0.1, decay=0.5, mc_samples=None, joint=True, check=None)
    result = fxcurv.compile(twin, LOSS, [fxcurv.extensions.KFLR(weight_sharing="expand", joint=True)], check=None)(x, y)
    optimizer.step((x, y))
    for name, factors in result.kflr.items():
        if isinstance(factors, Within):
            continue
        own = list(factors.arrangement.named(name))
        if len(factors) == 2:
            b, a = factors
            pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
            b, a = b + 0.1**0.5 / pi * torch.eye(len(b)).double(), a + 0.1**0.5 * pi * torch.eye(len(a)).double()
            g = torch.cat([result.grad[own[0]], result.grad[own[1]].unsqueeze(1)], 1)
            d = torch.linalg.solve(b, torch.linalg.solve(a, g, left=False))
            found = {own[0]: d[:, :-1], own[1]: d[:, -1]}
        else:
            found = {
                name: torch.linalg.solve(factors[0] + 0.1 * torch.eye(len(factors[0])).double(), result.grad[name])
            }
        for n, d in found.items():
            torch.testing.assert_close(model.get_parameter(n), twin.get_parameter(n) - 0.3 * d)


def test_steps_of_conjugate_gradients_are_those_of_the_dense_matrix():
    """Two groups with dampings of their own, and these as Levenberg and Marquardt change them."""
    model, x, y = case()
    twin, _, _ = case()
    groups = [
        {"params": model[0].parameters(), "damping": 0.2},
        {"params": [*model[2].parameters(), *model[3].parameters()]},
    ]
    known = {"lr": 1.0, "damping": 0.05, "weight_decay": 0.01, "iterations": 200, "tol": 1e-12, "adaptive": True}
    optimizer = NaturalGradientCG(model, LOSS, groups, **known, check=None)
    sizes = [p.numel() for p in twin.parameters()]
    dampings = torch.cat([torch.full((n,), 0.2 if k < 2 else 0.05, dtype=torch.float64) for k, n in enumerate(sizes)])
    for _ in range(3):
        before = optimizer.step((x, y)).loss
        oracle = Oracle(twin, LOSS, x, y, kind="ce")
        theta = torch.cat([p.detach().flatten() for p in twin.parameters()])
        g = torch.cat([t.flatten() for t in oracle.grad().values()]) + 0.01 * theta
        matrix = oracle.ggn_matrix()
        move = -torch.linalg.solve(matrix + dampings.diag(), g)
        for p, part in zip(twin.parameters(), move.split(sizes), strict=True):
            p.data += part.reshape(p.shape)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-7, atol=1e-9)
        model_says = g @ move + move @ (matrix @ move) / 2 + 0.01 * move @ move / 2
        now = LOSS(twin(x), y) - before + 0.01 * ((theta + move).square().sum() - theta.square().sum()) / 2
        ratio = float(now.detach() / model_says)
        dampings *= 1.5 if ratio < 0.25 else 2 / 3 if ratio > 0.75 else 1
        torch.testing.assert_close(optimizer.param_groups[1]["damping"], float(dampings[-1]))
        torch.testing.assert_close(optimizer.param_groups[0]["damping"], float(dampings[0]))


def test_few_iterations_from_a_start():
    """As many products as are asked for; from the solution none is wanted; the residual falls."""
    torch.manual_seed(0)
    root, b = torch.randn(9, 9).double(), {"a": torch.randn(4).double(), "c": torch.randn(5).double()}
    matrix, calls = root @ root.T + torch.eye(9).double(), []

    def times(v):
        calls.append(1)
        a, c = (matrix @ torch.cat([v["a"], v["c"]])).split([4, 5])
        return {"a": a, "c": c}

    zero, flat = {n: torch.zeros_like(t) for n, t in b.items()}, torch.cat([*b.values()])
    off = []
    for k in (1, 3, 30):
        calls.clear()
        x = conjugate_gradients(times, b, zero, k, 1e-12)
        off.append(float((torch.cat([*x.values()]) - torch.linalg.solve(matrix, flat)).norm()))
        assert len(calls) <= k + 1
    assert off[0] > off[1] > 1e3 * off[2] and off[2] < 1e-9
    calls.clear()
    conjugate_gradients(times, b, x, 10, 1e-6)
    assert len(calls) == 1


KINDS = {
    "kfac": lambda m, **o: KFAC(m, LOSS, joint=True, interval=2, check=None, **o),
    "ekfac": lambda m, **o: EKFAC(m, LOSS, joint=True, basis_interval=2, iterations=1, check=None, **o),
    "cg": lambda m, **o: NaturalGradientCG(m, LOSS, iterations=3, adaptive=True, check=None, **o),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_where_it_was(kind):
    """To the last bit, through a file that holds no code; a scheduler and a damping that falls reach the steps."""
    model, x, y = case(40)
    optimizer = KINDS[kind](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    losses = []
    for step in range(5):
        losses.append(float(optimizer.step((x, y), seed=step).loss))
        scheduler.step()
        for group in optimizer.param_groups:
            group["damping"] *= 0.9
    assert losses[-1] < 0.9 * losses[0]
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, _, _ = case()
    other.load_state_dict(state["model"])
    again = KINDS[kind](other)
    again.load_state_dict(state["optimizer"])
    for step in range(5, 8):
        optimizer.step((x, y), seed=step)
        again.step((x, y), seed=step)
    assert all(map(torch.equal, other.parameters(), model.parameters()))


@pytest.mark.slow
def test_averages_keep_their_precision():
    """A state's factors of a model in half precision are in float32, and stay so when they are loaded."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 3)).bfloat16(), torch.randn(9, 4).bfloat16(), torch.randint(3, (9,))
    optimizer = EKFAC(model, LOSS, check=None)
    optimizer.step((x, y))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    for p, saved in zip(model.parameters(), state["state"].values(), strict=True):
        for key in ("curvature", "basis", "moments"):
            assert all(t.dtype == torch.float32 for t in optimizer.state[p][key])
            assert all(map(torch.equal, optimizer.state[p][key], saved[key]))


@pytest.mark.slow
def test_they_train_digits_further_than_sgd_in_as_many_steps():
    x, y = (torch.as_tensor(t) for t in load_digits(return_X_y=True))
    x = x.float() / 16

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))

    def trained(model, step, steps=30):
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            picked = torch.randperm(len(x), generator=generator)[:256]
            step(x[picked], y[picked])
        with torch.no_grad():
            return float(LOSS(model(x), y))

    def plainly(lr):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

        def step(a, b):
            optimizer.zero_grad()
            LOSS(model(a), b).backward()
            optimizer.step()

        return trained(model, step)

    sgd = min(plainly(lr) for lr in (0.03, 0.1, 0.3, 1.0))
    curved = {
        "kfac": lambda m: KFAC(m, LOSS, lr=0.2, joint=True, damping=1e-2, check=None),
        "ekfac": lambda m: EKFAC(m, LOSS, lr=0.05, joint=True, damping=1e-2, basis_interval=5, check=None),
        "cg": lambda m: NaturalGradientCG(m, LOSS, lr=0.5, damping=1e-2, iterations=10, check=None),
    }
    for name, make in curved.items():
        model = net()
        optimizer = make(model)
        found = trained(model, lambda a, b, o=optimizer: o.step((a, b)))
        assert found < sgd, (name, found, sgd)


def test_what_is_refused():
    model, x, y = case()
    for kind, wrong in (
        (EKFAC, {"basis_interval": 0}), (EKFAC, {"iterations": 0}), (NaturalGradientCG, {"iterations": 0}),
        (NaturalGradientCG, {"warm": 2}),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            kind(model, LOSS, **wrong)
    optimizer = KFAC(model, LOSS)
    for wrong in (None, x, lambda: None):
        with pytest.raises(ArgumentError, match="pass a batch"):
            optimizer.step(wrong)
    with pytest.raises(ArgumentError, match="make a new optimizer"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(ArgumentError, match="GradScaler"):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        scaler.step(optimizer, (x, y))


@pytest.mark.slow
def test_weight_and_bias_in_two_groups_are_refused():
    model, x, y = case()
    groups = [{"params": [p for p in model.parameters() if p.ndim == d], "lr": 0.1 * d} for d in (1, 2)]
    with pytest.raises(ArgumentError, match="two groups"):
        KFAC(model, LOSS, groups, joint=True).step((x, y))


def params_of(model):
    return [p.detach().clone() for p in model.parameters()]


EVERY = {"diag": lambda m, **o: DiagGGN(m, LOSS, check=None, **o), **KINDS}


@pytest.mark.parametrize("kind", ["diag", "cg", *(pytest.param(k, marks=pytest.mark.slow) for k in ("kfac", "ekfac"))])
def test_numbers_that_are_not_finite_are_no_step(kind):
    """Weights and averages stay, and the batch can be skipped: the next step is that of an optimizer that has not seen it."""
    model, x, y = case()
    optimizer = EVERY[kind](model)
    optimizer.step((x, y), seed=0)
    before, twin = params_of(model), copy.deepcopy(optimizer)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="(?s)gradient of '0.weight' is not finite.*skip this batch"):
            optimizer.step((torch.cat([x[1:], x[:1] * bad]), y))
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step((x, y), seed=1)
    twin.step((x, y), seed=1)
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], twin.param_groups[0]["params"]))


def test_products_and_directions_that_are_not_finite():
    b = {"a": torch.ones(2), "c": torch.ones(3)}
    for wrong in (torch.nan, torch.inf, 1e30):  # the last one's square is not
        with pytest.raises(NonFiniteError, match="times the direction of 'c'"):
            conjugate_gradients(lambda v, w=wrong: {"a": v["a"], "c": v["c"] * w}, b, b, 3, 1e-3)
    model, x, y = nn.Linear(3, 2), torch.zeros(4, 3), torch.tensor([0, 1, 1, 1])
    optimizer, before = DiagGGN(model, LOSS, damping=0.0, mc_samples=None, check=None), params_of(model)
    with pytest.raises(NonFiniteError, match="(?s)direction of 'weight'.*damping= above zero"):
        optimizer.step((x, y))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("kind", ["diag", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS)])
def test_copies_go_on(kind):
    """By `copy` and by `pickle`, with a scheduler on the original, each with a model of its own."""
    model, x, y = case()
    optimizer = EVERY[kind](model)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    optimizer.step((x, y), seed=0)
    other, again = copy.deepcopy((model, optimizer))
    third = pickle.loads(pickle.dumps(optimizer))
    for one in (again, third):
        assert one.param_groups[0]["params"][0] is not model[0].weight
    for seed in range(1, 4):
        for one in (optimizer, again, third):
            one.step((x, y), seed=seed)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all(map(torch.equal, model.parameters(), third.param_groups[0]["params"]))


@pytest.mark.parametrize("kind", ["diag", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS)])
def test_frozen_parameters_are_skipped(kind):
    """From the start, as if they had not been passed; and for a while, with averages of the updates that they were part of."""
    model, x, y = case()
    twin, _, _ = case()
    for one in (model, twin):
        one[0].bias.requires_grad_(False)
    optimizer, same = EVERY[kind](model, params=model.parameters()), EVERY[kind](twin)
    for seed in range(2):
        optimizer.step((x, y), seed=seed)
        same.step((x, y), seed=seed)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    before = params_of(model)
    model[0].bias.requires_grad_(True)
    model[3].bias.requires_grad_(False)
    optimizer.step((x, y), seed=2)
    assert torch.equal(before[5], model[3].bias) and not torch.equal(before[1], model[0].bias)
    model[3].bias.requires_grad_(True)
    optimizer.step((x, y), seed=3)
    assert not torch.equal(before[5], model[3].bias)


def test_an_average_counts_its_own_updates():
    """A parameter that was frozen at the first update has the second one's curvature alone."""
    model, x, y = case()
    known = {"lr": 1.0, "momentum": 0, "damping": 0.1, "interval": 2, "mc_samples": None}
    optimizer = DiagGGN(model, LOSS, model.parameters(), **known, check=None)
    model[3].bias.requires_grad_(False)
    optimizer.step((x, y))
    model[3].bias.requires_grad_(True)
    twin, _, _ = case()
    twin.load_state_dict(model.state_dict())
    oracle = Oracle(twin, LOSS, x, y, kind="ce")
    want = model[3].bias.detach() - oracle.grad()["3.bias"] / (oracle.diag_ggn_exact()["3.bias"] + 0.1)
    optimizer.step((x, y))
    torch.testing.assert_close(model[3].bias.detach(), want)


def test_states_of_other_optimizers_are_refused():
    model, x, y = case()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = KFAC(model, LOSS)
    small = DiagGGN(nn.Linear(4, 3), LOSS, check=None)
    small.step((x.float(), y % 3))
    wide = DiagGGN(nn.Linear(5, 3), LOSS)
    for one, state, says in (
        (optimizer, plain.state_dict(), "another optimizer.*KFAC"), (optimizer, None, "NoneType"),
        (optimizer, DiagGGN(model, LOSS).state_dict(), "'DiagGGN'.*'KFAC'"),
        (optimizer, KFAC(model, LOSS, joint=True).state_dict(), "'joint': True.*'joint': False"),
        (wide, small.state_dict(), r"other parameters than 'weight' \[3, 5\]"),
    ):  # fmt: skip
        before = one.state_dict()
        with pytest.raises(ArgumentError, match=says):
            one.load_state_dict(state)
        assert str(one.state_dict()) == str(before)


def test_batches_and_numbers_that_are_none():
    model, x, y = case()
    optimizer = NaturalGradientCG(model, LOSS, check=None)
    optimizer.step((x, y))
    before, state = params_of(model), str(optimizer.state_dict())
    optimizer.step((x[:0], y[:0]))
    assert all(map(torch.equal, before, model.parameters())) and str(optimizer.state_dict()) == state
    for wrong in (3, (), "ab", {"x": x, "y": y}):
        with pytest.raises(ArgumentError, match="pass a batch"):
            optimizer.step(wrong)
    for key, value in (("damping", -0.1), ("lr", "a"), ("weight_decay", None), ("momentum", 1.5)):
        kept, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
        with pytest.raises(ArgumentError, match=key):
            optimizer.step((x, y))
        optimizer.param_groups[0][key] = kept
        with pytest.raises(ArgumentError, match=key):
            KFAC(model, LOSS, **{key: value})
    for key in ("decay", "interval", "basis_interval"):
        with pytest.raises(ArgumentError, match=f"{key}='a'"):
            EKFAC(model, LOSS, **{key: "a"})
