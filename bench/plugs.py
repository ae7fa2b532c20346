"""Time other libraries with fxcurv inside against what they have themselves: ``python bench/plugs.py``, a few minutes.

laplace-torch: a fit of the MNIST CNN's posterior to a data set, by its default backend and by fxcurv's. Opacus: an epoch of
private training with ghost clipping, by its own engine and by `fxcurv.plugs.opacus`. The two take turns; a row is the median over
rounds of the other library's time relative to fxcurv's in the same round. A first round, in which fxcurv compiles, is not counted
but shown (`first_s`). The exit status is 1 where a ratio is below its goal.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import mnist_cnn
from measure import Row, machine, print_rows, set_up, version, write
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

# At 128 the Jacobians of all outputs, which laplace-torch's default makes for a diagonal, are gigabytes.
BATCH = 32
GOALS = {"KronLaplace": 2.0, "DiagLaplace": 3.0, "ghost clipping": 2.0}
HEAD = ("task", "images", "rounds", "theirs_s", "ours_s", "ratio", "goal", "first_s")
COLUMNS = (*HEAD, "versions", "device", "threads", "cpu", "cores", "torch", "fxcurv", "date")
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def data(images: int) -> TensorDataset:
    """Noise of MNIST's shape: a fit takes as long on digits."""
    torch.manual_seed(0)
    return TensorDataset(torch.rand(images, 1, 28, 28), torch.randint(10, (images,)))


def fits(images: int, structure: str) -> Pair:
    """A fit of all weights' posterior, by laplace-torch's default backend and by ours."""
    from laplace import Laplace

    from fxcurv.plugs.laplace import FxcurvGGN

    model, loader = mnist_cnn()[0], DataLoader(data(images), BATCH)

    def fit(**backend: Any) -> None:
        found = Laplace(model, "classification", subset_of_weights="all", hessian_structure=structure, **backend)
        found.fit(loader)

    return fit, lambda: fit(backend=FxcurvGGN)


def private_steps(images: int) -> Pair:
    """An epoch of ghost clipping, by Opacus' engine and with ours in it."""
    from opacus import PrivacyEngine

    from fxcurv.plugs.opacus import make_private

    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False}
    model, loss, loader = mnist_cnn()[0], nn.CrossEntropyLoss(), DataLoader(data(images), BATCH)
    own, ours = copy.deepcopy(model), copy.deepcopy(model)
    wrapped, optimizer, criterion, batches = PrivacyEngine().make_private(
        module=own, optimizer=torch.optim.SGD(own.parameters(), lr=0.01), data_loader=loader, criterion=loss,
        grad_sample_mode="ghost", **options,
    )  # fmt: skip
    samples, stepper, parts = make_private(
        PrivacyEngine(),
        ours,
        loss,
        torch.optim.SGD(ours.parameters(), lr=0.01),
        loader,
        grad_sample_mode="ghost",
        **options,
    )

    def theirs() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            criterion(wrapped(x), y).backward()
            optimizer.step()

    def with_fxcurv() -> None:
        for x, y in parts:
            stepper.zero_grad()
            samples(x, y)
            stepper.step()

    return theirs, with_fxcurv


TASKS: dict[str, Callable[[int], Pair]] = {
    "KronLaplace": lambda images: fits(images, "kron"),
    "DiagLaplace": lambda images: fits(images, "diag"),
    "ghost clipping": private_steps,
}


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(task: str, images: int, rounds: int, progress: tqdm) -> Row:
    """One row; who begins a round turns."""
    pair = TASKS[task](images)
    seconds(pair[0])
    first, times = seconds(pair[1]), ([], [])
    progress.update()
    for order in itertools.islice(itertools.cycle([(0, 1), (1, 0)]), rounds):
        for k in order:
            times[k].append(seconds(pair[k]))
        progress.update()
    theirs, ours = (statistics.median(t) for t in times)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    found = {"theirs_s": theirs, "ours_s": ours, "ratio": ratio, "first_s": first}
    return {
        "task": task, "images": images, "rounds": rounds, "goal": GOALS[task], **{k: f"{v:.3g}" for k, v in found.items()}
    }  # fmt: skip


def main() -> int:
    """Measure, print, compare with the goals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plugs.csv")
    args = parser.parse_args()
    device = torch.device("cpu")
    set_up(device, args.threads)
    warnings.filterwarnings("ignore")  # of the libraries about themselves
    shared = machine(device, args.threads)
    shared["versions"] = f"laplace-torch {version('laplace-torch')}, Opacus {version('opacus')}"
    with tqdm(total=len(args.tasks) * (args.rounds + 1), dynamic_ncols=True, unit="round") as progress:
        rows = [measured(task, args.images, args.rounds, progress) for task in args.tasks]
    print_rows(rows, HEAD, HEAD[1:])
    write(args.out, COLUMNS, [row | shared for row in rows], ("task",))
    return 1 if any(float(row["ratio"]) < row["goal"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
