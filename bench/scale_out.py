"""KFAC on many devices, on paper: ``python bench/scale_out.py``. A model; nothing in it is measured on a GPU.

Weak scaling, from what a program sends and computes, and from published numbers of machines. Counted on the shapes of layers,
for GPT-2 (small, 1,024 tokens a device) and ResNet-50 (32 images a device): FLOPs of the forward and backward pass, of one
sampled column that goes down once more, of the factors' covariances and of their eigendecompositions (9 n^3 each, Golub & Van
Loan 2013, section 8.3); bytes of the gradient and of the factors' triangles, float32, as `bench/distributed.py` counts them in
graphs. Biases and norms are left out, and so are the factors of GPT-2's embedding, which is also its head
(`KFAC(others="skip")`). Of the machine:

    peak        312 TFLOP/s of an A100 in bfloat16, 19.5 in float32: "NVIDIA A100 Tensor Core GPU" (datasheet, NVIDIA 2021),
                nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    efficiency  0.4 of bfloat16's for passes and covariances: 126 TFLOP/s a device in 2,240 A100 (Smith et al. 2022, "Using
                DeepSpeed and Megatron to train Megatron-Turing NLG 530B", section 2.4, arxiv.org/abs/2201.11990); 502 PFLOP/s in
                3,072 are 0.52 (Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters using
                Megatron-LM", arxiv.org/abs/2104.04473). Both are of much larger models;
                0.1 of float32's for eigendecompositions, an assumption
    bandwidth   300 GB/s each way among the 8 devices of a node (NVLink, the same datasheet: 600 for both ways); 25 GB/s a device
                between nodes: of a DGX A100 8 ports of 200 Gb/s, ConnectX-6 ("Defining AI innovation with NVIDIA DGX
                A100", NVIDIA technical blog 2020, developer.nvidia.com/blog/defining-ai-innovation-with-dgx-a100)
    latency     5 us a step of a ring, an assumption

A ring of R devices sends 2 (R - 1)/R of the bytes through its slowest link, in 2 (R - 1) steps; a reduction to one rank or a
broadcast takes half of that. Nothing overlaps, so this is an upper bound. Factors and inverses are made at every
`--interval`-th step.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

PEAK, EFFICIENCY = 312e12, 0.4
PEAK_FLOAT32, EFFICIENCY_EIGEN, EIGEN = 19.5e12, 0.1, 9
NODE, INSIDE, BETWEEN, LATENCY = 8, 300e9, 25e9, 5e-6
DEVICES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
METHODS = ("gradient", "all", "layers")
COLUMNS = (
    "model",
    "method",
    "devices",
    "compute_ms",
    "inverse_ms",
    "communication_ms",
    "step_ms",
    "communication_share",
)


@dataclass(frozen=True)
class Layer:
    """A weight [out, in] that is used at `positions` of a device's batch; `plain`: one without factors."""

    out: int
    inputs: int
    positions: int
    plain: bool = False

    @property
    def parameters(self) -> int:
        return self.out * self.inputs

    @property
    def triangles(self) -> int:
        """The numbers of its factors that travel."""
        return 0 if self.plain else (self.out * (self.out + 1) + self.inputs * (self.inputs + 1)) // 2

    @property
    def covariances(self) -> int:
        """FLOPs, of one column."""
        return 0 if self.plain else 2 * self.positions * (self.out**2 + self.inputs**2)

    @property
    def eigen(self) -> int:
        """FLOPs of the factors' decompositions."""
        return 0 if self.plain else EIGEN * (self.out**3 + self.inputs**3)


def gpt2(tokens: int = 1024, width: int = 768, blocks: int = 12, vocabulary: int = 50257) -> list[Layer]:
    """The layers of GPT-2 (small)."""
    inside = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [Layer(o, i, tokens) for _ in range(blocks) for o, i in inside] + [
        Layer(vocabulary, width, tokens, plain=True)
    ]


def resnet50(images: int = 32) -> list[Layer]:
    """The convolutions of ResNet-50 at 224 x 224, and its head."""
    layers, inputs = [Layer(64, 3 * 49, images * 112**2)], 64
    for blocks, width, side in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)):
        for k in range(blocks):
            first = side * (2 if k == 0 and width > 64 else 1)  # torchvision's has the stride in the 3 x 3
            layers += [Layer(width, inputs, images * first**2), Layer(width, 9 * width, images * side**2)]
            layers += [Layer(4 * width, width, images * side**2)]
            layers += [Layer(4 * width, inputs, images * side**2)] if k == 0 else []
            inputs = 4 * width
    return [*layers, Layer(1000, 2048, images)]


MODELS = {"GPT-2": gpt2, "ResNet-50": resnet50}


def ring(numbers: float, devices: int, size: int = 4) -> float:
    """Seconds of an all-reduce."""
    if devices == 1:
        return 0.0
    slowest = INSIDE if devices <= NODE else BETWEEN
    return 2 * (devices - 1) / devices * numbers * size / slowest + 2 * (devices - 1) * LATENCY


def longest(costs: list[int], devices: int) -> int:
    """The largest sum of costs at one device: the largest goes first to the one that has least, as in `passes.owners`."""
    load = [0] * min(devices, len(costs))
    for cost in sorted(costs, reverse=True):
        load[load.index(min(load))] += cost
    return max(load)


def step(layers: list[Layer], method: str, devices: int, interval: int) -> tuple[float, float, float]:
    """Seconds of (passes and covariances, inverses, communication) of a step, on average."""
    numbers = sum(layer.parameters for layer in layers)
    passes = sum(6 * layer.parameters * layer.positions for layer in layers)
    gradient = ring(numbers, devices)
    if method == "gradient":
        return passes / PEAK / EFFICIENCY, 0.0, gradient
    # a sampled column goes down once more: two FLOPs a multiplication, for the inputs' cotangents alone
    sampled = passes / 3 + sum(layer.covariances for layer in layers)
    compute = (passes + sampled / interval) / PEAK / EFFICIENCY
    eigen = [layer.eigen for layer in layers]
    most = sum(eigen) if method == "all" else longest(eigen, devices)
    factors = ring(sum(layer.triangles for layer in layers), devices)
    halves = factors if method == "all" else factors / 2
    broadcast = 0.0 if method == "all" else gradient / 2
    return compute, most / interval / PEAK_FLOAT32 / EFFICIENCY_EIGEN, gradient + halves / interval + broadcast


def rows(interval: int) -> Iterator[list]:
    """A row for each model, method and number of devices."""
    for name, layers in MODELS.items():
        for method in METHODS:
            for devices in DEVICES:
                compute, inverse, communication = step(layers(), method, devices, interval)
                total = compute + inverse + communication
                yield [name, method, devices, *(f"{1e3 * t:.3f}" for t in (compute, inverse, communication, total)),
                       f"{communication / total:.3f}"]  # fmt: skip


def picture(table: list[list], file: Path, interval: int) -> None:
    """The time of a step and its share of communication, over devices."""
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fxcurv"})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(MODELS), figsize=(9, 6), sharex=True, layout="constrained")
    titles = {"gradient": "gradient alone", "all": 'KFAC(assign="all")', "layers": 'KFAC(assign="layers")'}
    for column, name in enumerate(MODELS):
        for method in METHODS:
            known = [row for row in table if row[:2] == [name, method]]
            for row, value in ((0, 6), (1, 7)):
                axes[row][column].plot(DEVICES, [float(r[value]) for r in known], marker=".", label=titles[method])
        axes[0][column].set(title=name, xscale="log", yscale="log")
        axes[1][column].set(xlabel="devices", ylim=(0, 1))
    axes[0][0].set_ylabel("ms a step")
    axes[1][0].set_ylabel("share of communication")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"A model on paper (see bench/scale_out.py), not a measurement; factors every {interval} steps")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Compute, and write the table and the picture."""
    parser = argparse.ArgumentParser(description="KFAC on paper, up to 1,024 devices: no measurement")
    parser.add_argument("--interval", type=int, default=10, help="steps from one curvature to the next")
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / "scale_out_model.csv")
    parser.add_argument("--figure", type=Path, default=here.parent / "docs" / "scale-out.svg")
    args = parser.parse_args()
    table = list(rows(args.interval))
    with args.out.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *table])
    picture(table, args.figure, args.interval)
    for row in table:
        if row[2] in (8, 64, 1024):
            print("  ".join(str(cell).rjust(9) for cell in row))


if __name__ == "__main__":
    main()
