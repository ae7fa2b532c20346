"""Models of `transformers` against the oracle; without it installed these tests are skipped."""

from __future__ import annotations

import pytest
import torch
from case_tools import Case
from cases_huggingface import MODELS
from covering import covering
from model_checks import GROUPS, Checked

from fxcurv.errors import CaptureError, MixedSamplesError, UnsupportedOpError

pytest.importorskip("transformers", reason="checks models of transformers, of the extra `models`")

# what the models say of their own code while they are traced
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

REFUSED = {"mixtral_eager": (CaptureError, "expert"), "mixtral_grouped_mm": (UnsupportedOpError, "grouped_mm_fallback")}
WORKING = [name for name in MODELS if name not in REFUSED]
FIRST = [g for g in GROUPS if g not in ("Hessian", "products")]
DTYPES = [torch.float64, torch.float32]


def checked(case: Case, groups: list[str], dtype: torch.dtype = torch.float64, training: bool = False) -> None:
    found = Checked(case, groups, dtype, training, debug=True)
    for group in groups:
        found.check(group)


@pytest.mark.parametrize("name", ["gpt2_classifier", "vit"])
def test_some_quantities(name):
    """One model that reads text and one that reads images; the others, and all quantities, are slow."""
    checked(MODELS[name], ["gradient", "first order", "Gauss-Newton"])


def test_factors_in_training():
    """With dropout, in float32."""
    checked(MODELS["bert_classifier"], ["gradient", "Kronecker"], torch.float32, training=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "training"), covering(WORKING, DTYPES, [False, True]))
def test_first_derivatives(name, dtype, training):
    if training and "batch_norm" in MODELS[name].tags:
        with pytest.raises(MixedSamplesError, match="batch_norm"):
            checked(MODELS[name], ["first order"], dtype, training)
        checked(MODELS[name], ["gradient"], dtype, training)
    else:
        checked(MODELS[name], FIRST, dtype, training)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKING)
def test_second_derivatives(name):
    checked(MODELS[name], ["Hessian", "products"])


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """Experts chosen by a loop over values; tokens of all samples sorted together."""
    error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        checked(MODELS[name], ["first order"])
