"""Every row of the tables in this folder whose model reads `training` runs in training mode too."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import test_derivatives_inside
import test_made_of_sizes
import test_merged_samples
import test_packed_sequences
import test_public_losses
import test_public_models
import test_rows_per_sample
import test_sizes_of_values
import test_static_routing
import test_summed_outputs
from situations import Situation
from torch import nn

# test_branches runs every row in both modes
TABLES = {
    "derivatives": test_derivatives_inside.ROWS,
    "made of sizes": test_made_of_sizes.SITUATIONS,
    "merged": test_merged_samples.SITUATIONS,
    "packed": test_packed_sequences.SITUATIONS,
    "packed inputs": test_packed_sequences.INPUTS,
    "public losses": test_public_losses.LOSSES,
    "public models": test_public_models.MODELS,
    "rows per sample": test_rows_per_sample.SITUATIONS,
    "values": test_sizes_of_values.ROWS,
    "routing": test_static_routing.SITUATIONS,
    "summed": test_summed_outputs.SITUATIONS,
}
# run in training mode by a test of their own, or of threads about the model in eval mode
APART = {
    ("merged", "dropout"), ("public losses", "dropout and evaluated batch norm"),
    ("public models", "residual block with in-place rectifiers and evaluated batch norm"),
    ("public models", "products with a residual net, evaluated"), ("public models", "spectral norm, evaluated"),
    ("public models", "recurrent regression with dropout and batch norm"), ("derivatives", "forces, as numbers"),
    ("derivatives", "images"),
}  # fmt: skip
# in training mode they differ by what they drop alone
DROPPING = nn.RNNBase | nn.MultiheadAttention | nn.TransformerEncoderLayer


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from codes(inner)


def reads_the_mode(module: nn.Module) -> bool:
    """Whether its forward pass names `training`, and has anything to drop or to count."""
    functions = [type(module).forward, *(f for f in vars(module).values() if isinstance(f, types.FunctionType))]
    named = any("training" in code.co_names for f in functions for code in codes(f.__code__))
    drop = getattr(module, "dropout", None)
    drops = getattr(drop, "p", drop) != 0 if isinstance(module, DROPPING) else getattr(module, "p", 1) != 0
    return named and drops


@pytest.mark.parametrize("table", TABLES)
def test_rows_that_read_the_mode_run_in_both(table: str) -> None:
    rows: dict[str, Situation] = TABLES[table]
    for name, row in rows.items():
        if not row.trains and (table, name) not in APART:
            reading = [path or "the model" for path, m in row.built(2)[0].named_modules() if reads_the_mode(m)]
            assert not reading, f"{name}: {reading} in training mode is another model: trains=True"


def test_what_stands_apart_is_there() -> None:
    assert all(name in TABLES[table] for table, name in APART)
