"""A small GPT with sharded parameters and a Kronecker-factored step
===================================================================

`torchrun --nproc-per-node=2 examples/fsdp_kfac.py`: a language model of characters, cut by `fully_shard` (FSDP2), is trained by
KFAC's step. Every process has a part of each batch; the graph gathers a layer's parameters when it needs them, gradients come
back in shards, and each layer's factors go to one process, which solves with them for all (`KFAC(assign="layers")`).

With `--checkpoint DIR` the parameters are saved at the end by `torch.distributed.checkpoint`, and where they are there training
goes on from them: also on another number of processes, with the losses that training in one go has.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

import fxcurv
from fxcurv.extensions import KFAC
from fxcurv.kronecker import Blocks

STEP_SIZE, DAMPING, WINDOW = 0.1, 0.03, 16
# William Blake, The Tyger (1794)
TEXT = """Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?
In what distant deeps or skies.
Burnt the fire of thine eyes?
On what wings dare he aspire?
What the hand, dare seize the fire?
"""


class Block(nn.Module):
    """Attention to what came before, and a layer of its own for every position."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    """Scores [N, characters, T] of the next character."""

    def __init__(self, characters: int, width: int = 16, blocks: int = 2):
        super().__init__()
        self.embed, self.at = nn.Embedding(characters, width), nn.Embedding(WINDOW, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.at(torch.arange(WINDOW, device=x.device))
        return self.head(self.norm(self.blocks(h))).transpose(1, 2)


def sharded(characters: int, mesh: DeviceMesh) -> GPT:
    """The model at its start, a bucket of parameters for each block and one for the rest."""
    torch.manual_seed(0)
    model = GPT(characters).double()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(codes: Tensor, step: int, size: int) -> tuple[Tensor, Tensor]:
    """This process' windows of the batch of a step, and what follows each character; the last process has more than others."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(codes) - WINDOW, (size,), generator=generator)
    count, rank = dist.get_world_size(), dist.get_rank()
    own = size // (count + 1) if count > 1 else size
    starts = starts[rank * own :] if rank == count - 1 else starts[rank * own : (rank + 1) * own]
    at = starts[:, None] + torch.arange(WINDOW)
    return codes[at], codes[at + 1]


def take_step(model: nn.Module, result: fxcurv.Result) -> None:
    """One layer's step is computed by the process that has its factors; every process keeps its shard of it."""
    gradient = {name: g.full_tensor() for name, g in result.grad.items()}
    direction = Blocks(result.kfac).solve(gradient, DAMPING, pi=True)
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        whole = DTensor.from_local(direction[name], p.device_mesh, [Replicate()], run_check=False)
        with torch.no_grad():
            p.sub_(whole.redistribute(placements=p.placements), alpha=STEP_SIZE)


def train(steps: int, size: int, checkpoint: Path | None) -> list[float]:
    """The loss of every batch before its step, from where an earlier training stopped."""
    alphabet = sorted(set(TEXT))
    codes = torch.tensor([alphabet.index(c) for c in TEXT])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    model, done = sharded(len(alphabet), mesh), torch.zeros((), dtype=torch.long)
    state = {"model": model.state_dict(), "done": done}
    if checkpoint is not None and (checkpoint / ".metadata").exists():
        dcp.load(state, checkpoint_id=checkpoint)
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [KFAC(assign="layers")], mesh=mesh)
    losses = []
    for step in range(int(done), steps):
        result = compiled(*batch(codes, step, size), seed=step)
        losses.append(float(result.loss))
        take_step(model, result)
    if checkpoint is not None:
        done.fill_(steps)
        dcp.save({"model": model.state_dict(), "done": done}, checkpoint_id=checkpoint)
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the losses; without torchrun, on one process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--checkpoint", type=Path, help="a folder")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        alone = {} if "RANK" in os.environ else {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **alone)
        losses = train(args.steps, args.batch_size, args.checkpoint)
        count, rank = dist.get_world_size(), dist.get_rank()
        dist.destroy_process_group()
    if rank == 0:
        print(f"{count} processes, the loss of every batch")
        print(" ".join(f"{loss:.10f}" for loss in losses))


if __name__ == "__main__":
    main()
