"""Every script in examples/ runs and prints what it promises, on the digits with few steps; in full with the slow ones."""

from __future__ import annotations

import argparse
import gzip
import importlib
import re
import runpy
import struct
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).parents[2] / "examples"
MODULES = {"data"}  # that scripts import
SCRIPTS = {
    "demo", "batched_jacobians", "all_extensions", "gradient_of_variance", "diag_ggn_optimizer", "train_compiled",
    "train_distributed", "fsdp_kfac",
}  # fmt: skip
PICTURES = {
    "elastic_weights", "gradient_noise", "influence", "laplace_classification", "laplace_regression", "kfac_factors",
    "optimizers", "private_training", "pruning", "spectrum", "tangent_kernel", "token_gradients",
}  # fmt: skip
PNG = b"\x89PNG"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a script as `python examples/<name>.py <args>` in an empty folder; returns what it prints."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    plt.switch_backend("agg")
    yield run
    plt.close("all")


@pytest.fixture
def shown(run, monkeypatch):
    """Run a script that shows a picture; returns what it prints, and the axes of its picture."""

    def shown(name: str) -> tuple[str, list[plt.Axes]]:
        pictures = []
        monkeypatch.setattr(plt, "show", lambda: pictures.extend(plt.get_fignums()))
        out = run(name)
        (number,) = pictures
        figure = plt.figure(number)
        figure.canvas.draw()
        return out, figure.axes

    return shown


def is_png(path: Path) -> bool:
    return path.read_bytes()[:4] == PNG


def test_all_scripts_are_here_and_in_the_readme():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SCRIPTS | PICTURES | MODULES
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in readme for name in SCRIPTS | PICTURES)


def numbers(out: str, pattern: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, out)]


@pytest.mark.slow
def test_gradient_noise(shown):
    out, (axes,) = shown("gradient_noise")
    measured, predicted = numbers(out, r"measured (\S+),"), numbers(out, r"predicted (\S+)")
    assert len(measured) == 12 and len(axes.lines) == 4
    ratios = torch.tensor(measured) / torch.tensor(predicted)
    assert ratios.min() > 0.5 and ratios.max() < 2  # over a range of 32


@pytest.mark.slow
def test_elastic_weights(shown):
    """Held by Kronecker factors, both tasks are known; the worse of them less so by a diagonal, or by distance."""
    out, (axes,) = shown("elastic_weights")
    pairs = re.findall(r": first task ([\d.]+), second ([\d.]+)", out)
    distance, diagonal, kronecker, nothing = (min(map(float, pair)) for pair in pairs)
    assert nothing < distance < diagonal < kronecker and len(axes.lines) == 4


@pytest.mark.slow
def test_optimizers(shown):
    out, (axes,) = shown("optimizers")
    losses = {name: float(value) for name, value in re.findall(r"(\w+): loss ([\d.]+)", out)}
    assert losses["DiagGGN"] < losses["SGD"] and len(axes.lines) == 6
    assert max(losses[name] for name in ("KFAC", "EKFAC", "NaturalGradientCG")) < min(losses["SGD"], losses["Adam"])


def test_laplace_regression(shown):
    out, (axes,) = shown("laplace_regression")
    near, far = numbers(out, r"(\d\.\d+)")
    assert 0.02 < near < 0.2 < 3 * near < far


@pytest.mark.slow
def test_laplace_classification(shown):
    """The posterior is less sure, above all of digits that it has not seen."""
    out, axes = shown("laplace_classification")
    point, point_other, posterior, posterior_other = numbers(out, r": (0\.\d+) of the images")
    assert posterior < point and posterior_other < 0.1 < point_other and len(axes) == 2


@pytest.mark.slow
def test_private_training(shown):
    """The accuracy falls with the noise; what it buys is as Opacus counts."""
    out, axes = shown("private_training")
    accuracies, spent = numbers(out, r"accuracy ([\d.]+)"), numbers(out, r"ε = ([\d.]+)")
    assert accuracies[0] > accuracies[1] > accuracies[2] > 0.7 and spent == [10.6, 1.4] and len(axes) == 2


@pytest.mark.slow
def test_tangent_kernel(shown):
    out, axes = shown("tangent_kernel")
    (before, after), (low, high) = numbers(out, r"training: accuracy ([\d.]+)"), numbers(out, r"labels ([\d.]+)")
    assert 0.85 < before < after and 2 * low < high and len(axes) == 2


@pytest.mark.slow
def test_influence(shown):
    out, axes = shown("influence")
    (accuracy,), (found,), (same,) = (numbers(out, rf"{said}: ([\d.]+)") for said in ("digits", "largest", "label"))
    assert accuracy > 0.85 and found >= 20 and same >= 6 and len(axes) == 28


@pytest.mark.slow
def test_kfac_factors(shown):
    out, axes = shown("kfac_factors")
    errors = dict(zip(("KFLR", "KFAC", "EKFAC", "diagonal"), numbers(out, r"relative error ([\d.]+)"), strict=True))
    assert errors["KFLR"] < errors["diagonal"] < 1 and len(axes) == 4


@pytest.mark.slow
def test_pruning(shown):
    """Curvature is the best of the scores where it is asked for anew, chance the worst."""
    out, (axes,) = shown("pruning")
    chance, magnitude, once, again = numbers(out, r"sparsity 0.8: ([\d.]+)")
    assert chance < once < again and chance < magnitude < again


@pytest.mark.slow
def test_spectrum(shown):
    out, axes = shown("spectrum")
    negative, (first, last) = numbers(out, r"negative +(\d+)"), numbers(out, r"layer: (\d+) of")
    assert negative[1] == negative[3] == 0 < negative[2] < negative[0] and len(axes) == 3
    assert last == 0 < first  # behind the activations there is no curvature but the loss'


@pytest.mark.slow
def test_token_gradients(shown):
    out, _ = shown("token_gradients")
    assert "padding: largest norm 0e+00" in out
    assert numbers(out, r"rank correlation of norm and loss: ([\d.]+)")[0] > 0.5


def test_demo(run):
    out = run("demo", "--epochs", 3, "--figure", "small.png")
    found = re.search(r"held-out accuracy ([\d.]+)", out)
    assert found and float(found[1]) > 0.9
    assert "columns on the V axis: 1 gradient" in out
    assert is_png(Path("small.png"))


def test_train_compiled(run):
    """Three steps, the last batch smaller; in full, with Inductor, by `make examples`."""
    out = run("train_compiled", "--backend", "aot_eager", "--steps", 3, "--batch-size", 700, "--figure", "times.png")
    assert re.findall(r"^(eager|compiled step|backend=) .* the same losses$", out, re.M) == [
        "eager",
        "compiled step",
        "backend=",
    ]
    assert is_png(Path("times.png"))


def test_batched_jacobians(run):
    out = run("batched_jacobians", "--figure", "heat.png")
    assert re.findall(r"(\S+) +Jacobian (\[.*\])", out) == [
        ("0.weight", "[15, 5, 7, 10]"),
        ("0.bias", "[15, 5, 7]"),
        ("2.weight", "[15, 5, 5, 7]"),
        ("2.bias", "[15, 5, 5]"),
    ]
    assert re.findall(r"autograd and (.*): agree", out) == [
        "BatchGrad (compile)",
        "SqrtGGNExact (compile)",
        "Jacobian (compile)",
        "BatchGrad (backpack)",
        "SqrtGGNExact (backpack)",
    ]
    assert is_png(Path("heat.png"))


def fields(out: str, style: str) -> dict[str, dict[str, list[str]]]:
    """parameter -> field -> shapes, as printed for the single backward."""
    section = out.split(f"== every one in a single backward ({style})\n")[1].split("==")[0]
    found: dict[str, dict[str, list[str]]] = {}
    for name, lines in re.findall(r"^(\d\.\w+)\n((?:  \..*\n)+)", section, re.MULTILINE):
        of_name = found.setdefault(name, {})
        for field, shapes in re.findall(r"(\.\S+) +(.*)", lines):
            of_name.setdefault(field, []).append(shapes)
    return found


def shapes_of_weight(n: int) -> dict[str, list[str]]:
    """What BackPACK's documentation has for 512 images, for n."""
    whole, several = ["[10, 784]"], [f"[{n}, 10, 784]"]
    products = ["[1, 10, 784]", "[3, 10, 784]"]
    return {
        ".grad": whole, ".grad_batch": several, ".variance": whole, ".sum_grad_squared": whole, ".batch_l2": [f"[{n}]"],
        ".diag_ggn_exact": whole, ".diag_ggn_mc": whole, ".diag_ggn_exact_batch": several, ".diag_ggn_mc_batch": several,
        ".kfac": ["[10, 10], [784, 784]"], ".kflr": ["[10, 10], [784, 784]"], ".kfra": ["[10, 10], [784, 784]"],
        ".hbp": ["[10, 10], [784, 784]"], ".diag_h": whole, ".diag_h_batch": several,
        ".sqrt_ggn_exact": [f"[10, {n}, 10, 784]"], ".sqrt_ggn_mc": [f"[1, {n}, 10, 784]"],
        ".hmp(vec)": products, ".ggnmp(vec)": products, ".pchmp_clip(vec)": products, ".pchmp_abs(vec)": products,
    }  # fmt: skip


def shapes_of_bias(n: int) -> dict[str, list[str]]:
    """The same without the axis of inputs, and with one Kronecker factor."""
    return {
        field: [shape.split("], [")[0].rstrip("]").removesuffix(", 784") + "]" for shape in shapes]
        for field, shapes in shapes_of_weight(n).items()
    }


def check_all_extensions(out: str, n: int) -> None:
    for style in ("compile", "backpack"):
        found = fields(out, style)
        assert list(found) == ["1.weight", "1.bias"]
        assert shapes_of_weight(n).items() <= found["1.weight"].items()
        assert shapes_of_bias(n).items() <= found["1.bias"].items()
    assert "every quantity is the same by itself, among several and in the single backward" in out


def test_all_extensions(run):
    check_all_extensions(run("all_extensions", "--samples", 24, "--ask", "all"), 24)


@pytest.mark.slow
def test_all_extensions_in_full(run):
    out = run("all_extensions")
    check_all_extensions(out, 512)
    titles = re.findall(r"^== (.*) \((.*)\)$", out, re.MULTILINE)
    assert {style for title, style in titles if title == "BatchGrad, .grad_batch"} == {"compile", "backpack"}
    assert sum(title.startswith("several at once: ") for title, _ in titles) == 2 * 5


def test_gradient_of_variance(run):
    out = run("gradient_of_variance", "--samples", 8)
    answers = re.findall(r"^  (total variance|its gradient, \S+) +(\S+)$", out, re.MULTILINE)
    assert len(answers) == 2 * (2 + 3 + 5) and all(answer == "agree" for _, answer in answers)
    assert re.findall(r"^(\S.*): total variance", out, re.MULTILINE) == [
        "linear model",
        "linear classifier",
        "convolutional network",
    ]


def accuracies(out: str) -> list[float]:
    return [float(a) for a in re.findall(r"accuracy ([\d.]+)$", out, re.MULTILINE)]


def test_diag_ggn_optimizer(run):
    out = run("diag_ggn_optimizer", "--steps", 40, "--batch-size", 32, "--step-size", 0.2, "--figure", "curves.png")
    assert len(accuracies(out)) == 4 and min(accuracies(out)[1::2]) > 0.8  # the last step's in both styles
    assert "losses of both styles: agree" in out
    assert is_png(Path("curves.png"))


@pytest.mark.slow
def test_diag_ggn_optimizer_in_full(run):
    out = run("diag_ggn_optimizer", "--step-size", 0.05)
    assert re.findall(r"step +(\d+)/200", out) == ["0", "50", "100", "150", "200"] * 2
    reached = [int(step) for step in re.findall(r"first reached at step (\d+)", out)]
    assert len(reached) == 2 and max(reached) <= 100
    assert "losses of both styles: agree" in out


def idx(path: Path, values: torch.Tensor) -> None:
    """The format of MNIST's files."""
    header = struct.pack(f">{1 + values.ndim}i", 2048 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


def load(monkeypatch, *args: str) -> tuple[torch.Tensor, torch.Tensor]:
    monkeypatch.syspath_prepend(EXAMPLES)
    data = importlib.import_module("data")
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.load(parser.parse_args(args))


def test_digits(monkeypatch):
    x, y = load(monkeypatch)
    assert x.shape == (1797, 1, 28, 28) and y.shape == (1797,) and y.unique().tolist() == list(range(10))
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(), torch.tensor(1.0))


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_mnist(monkeypatch, tmp_path, part):
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    labels = torch.tensor([3, 0, 9, 9, 1], dtype=torch.uint8)
    idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
    idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    x, y = load(monkeypatch, "--data", "mnist", "--root", str(tmp_path))
    expected = images.float()
    torch.testing.assert_close(x[:, 0], (expected - expected.mean()) / expected.std())
    assert y.tolist() == labels.tolist() and y.dtype == torch.long


def test_mnist_that_is_not_there(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--root"):
        load(monkeypatch, "--data", "mnist")
    with pytest.raises(SystemExit, match="neither train"):
        load(monkeypatch, "--data", "mnist", "--root", str(tmp_path))
