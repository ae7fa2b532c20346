"""Trainings with sharded parameters go on from `torch.distributed.checkpoint` on another number of processes, also on one."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import on_ranks
from subjects import made, mesh_of, part
from torch.distributed.fsdp import fully_shard

from fxcurv.optim import EKFAC, DiagGGN

# a diagonal in shards; factors, bases and moments, which are whole: `KFAC` keeps less
KINDS = {
    "diag": lambda model, loss, **o: DiagGGN(model, loss, mc_samples=None, weight_decay=0.01, check=None, **o),
    "ekfac": lambda model, loss, **o: EKFAC(
        model, loss, basis_interval=2, fisher="empirical", joint=True, check=None, **o
    ),
}
SIZES = {1: [7], 2: [5, 2], 4: [3, 0, 2, 2]}


class Training:
    """A model and its optimizer: in shards on the ranks of a mesh, or, with `count` 1, on one process without a mesh."""

    def __init__(self, kind, rank=0, count=1):
        self.model, loss, x, y = made("squares", 7)
        options = {}
        if count > 1:
            fully_shard(self.model[0], mesh=mesh_of(count))
            options["mesh"] = mesh_of(count)
            fully_shard(self.model, mesh=options["mesh"])
        self.batch = part(x, SIZES[count], rank), part(y, SIZES[count], rank)
        self.optimizer = KINDS[kind](self.model, loss, **options)

    def steps(self, count):
        return [float(self.optimizer.step(self.batch, seed=3).loss) for _ in range(count)]

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def resumed(self, folder):
        """With what was saved, which is loaded into the state that a first step makes."""
        self.optimizer.step(self.batch, seed=0)
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self


def saved(rank, count, folder):
    losses = {}
    for kind in KINDS:
        training = Training(kind, rank, count)
        losses[kind] = training.steps(3)
        dcp.save(training.state(), checkpoint_id=f"{folder}/{kind}")
    return losses


def resumed(rank, count, folder):
    return {kind: Training(kind, rank, count).resumed(f"{folder}/{kind}").steps(3) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # on one process, which is meant
def test_what_four_processes_saved_two_and_one_go_on_from(tmp_path):
    torch.set_num_threads(1)
    alone = {kind: Training(kind) for kind in KINDS}
    want = {kind: training.steps(6) for kind, training in alone.items()}
    first = on_ranks(4, saved, 4, str(tmp_path), limit=900)
    then = on_ranks(2, resumed, 2, str(tmp_path), limit=900)
    one = {
        kind: training.resumed(f"{tmp_path}/{kind}").steps(3) for kind, training in alone.items()
    }  # compiled already
    for kind, losses in want.items():
        assert len(set(losses)) == 6, "every step changes the loss"
        for begun, gone_on in ((first[0], then[0]), (first[3], then[1]), (first[0], one)):
            assert [*begun[kind], *gone_on[kind]] == pytest.approx(losses, rel=1e-9), kind
