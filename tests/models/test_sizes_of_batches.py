"""Models of `transformers` in batches of changing sizes, as Poisson sampling draws them: one program serves all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_huggingface import MODELS
from test_huggingface import WORKING
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fxcurv
from fxcurv.extensions import BatchL2Grad, SumGradSquared

pytest.importorskip("transformers", reason="checks models of transformers, of the extra `models`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# sizes that an op of theirs fixes: a state-space model's scan
FIXED = {"mamba"}


def of_size(value: Any, n: int) -> Any:
    """The first n samples of a batch, again from the start where it has fewer."""
    return tree_map_only(Tensor, lambda t: t[torch.arange(n) % len(t)], value)


@pytest.mark.parametrize("name", [name for name in WORKING if name not in FIXED])
def test_one_program_for_all_batch_sizes(name: str) -> None:
    model, loss, inputs, targets = MODELS[name].build()
    compiled = fxcurv.compile(model, loss, [BatchL2Grad(), SumGradSquared()])
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for n in (3, 5, 2):
        x, y = of_size(inputs, n), of_size(targets, n)
        result = compiled(x, y)
        true = torch.autograd.grad(loss(model(**x), y), list(parameters.values()), allow_unused=True)
        for (key, p), g in zip(parameters.items(), true, strict=True):
            torch.testing.assert_close(result.grad[key], torch.zeros_like(p) if g is None else g, rtol=1e-4, atol=1e-6)
    assert compiled.recompiles == []
