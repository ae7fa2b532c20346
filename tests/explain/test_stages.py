"""The program after any stage can be read and drawn, and shows what the stage did."""

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.contractions.contract import Contract
from fxcurv.extensions import GGNMP, KFLR, KFRA, BatchGrad, BatchL2Grad
from fxcurv.passes import ANALYSIS, PIPELINE

STAGES = ["capture", *dict.fromkeys(step.__name__ for step in (*ANALYSIS, *PIPELINE))]


def lowered(stage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad(), BatchL2Grad(), KFLR(), KFRA(), GGNMP()])
    return compiled.lower(torch.randn(5, 3), torch.randint(2, (5,)), after=stage)


def contractions(program):
    return sum(isinstance(node.target, Contract) for node in program.graph.nodes)


@pytest.mark.parametrize(
    "stage",
    [s if s in ("capture", "propagate", "select") else pytest.param(s, marks=pytest.mark.slow) for s in STAGES],
)
def test_a_stage_is_read_and_drawn(stage, tmp_path):
    seen = lowered(stage)
    assert "linear" in seen.print_readable(print_output=False)
    seen.draw(tmp_path / "graph.svg")
    assert (tmp_path / "graph.svg").read_text().count("<rect") > 2
    at, program = STAGES.index(stage), seen.program
    assert bool(program.walked.uses) == (at >= STAGES.index("propagate"))
    assert bool(program.walked.averaged) == (at >= STAGES.index("average"))
    assert bool(program.walked.products) == (at >= STAGES.index("products"))
    assert bool(contractions(program)) == (STAGES.index("extract") <= at < STAGES.index("select"))
    assert bool(program.decisions) == (at >= STAGES.index("extract"))
