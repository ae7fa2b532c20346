"""Random models against the oracle: a few by default, more among the slow tests; `random_models.py` runs thousands."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from random_blocks import BLOCKS, image_residual, residual, shared
from random_models import GROUPS, IMAGES, SEQUENCES, VECTORS, Example, examples, run

# A failure prints its example; to shrink or to explain it would compile hundreds of models.
FAST = settings(
    max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
MANY = settings(FAST, max_examples=60, derandomize=False)


def check(example):
    note(f"refused: {run(example)}")


@FAST
@given(examples(VECTORS, longest=3))
def test_vectors(example):
    check(example)


@FAST
@given(examples(SEQUENCES, longest=3))
def test_sequences(example):
    check(example)


@FAST
@given(examples(IMAGES, longest=3))
def test_images(example):
    check(example)


@pytest.mark.slow
@MANY
@given(examples(longest=5))
def test_many(example):
    check(example)


SHAPES = {1: (3,), 2: (3, 3), 3: (2, 4, 3)}
WITH_ACTIVATIONS = {residual, shared, image_residual}  # which are a block too
AT = {block: [kind for kind in BLOCKS if block in BLOCKS[kind]] for several in BLOCKS.values() for block in several}


def held(value: Any) -> Any:
    """What tells one function of a block from another: its code and what it closes over."""
    if inspect.isfunction(value):
        return value.__code__, *(held(cell.cell_contents) for cell in value.__closure__ or ())
    return value if isinstance(value, int | str) else type(value)


def variants(block: Any) -> Iterator[tuple[int, int]]:
    """(kind of shape, k): each option of a block once, in turn at the shapes that it is for, and one at least at each."""
    seen = set()
    for k in range(3 if block in WITH_ACTIVATIONS else 18):
        kind = AT[block][k % len(AT[block])]
        module, _ = block(SHAPES[kind], k)
        option = repr(module), *(held(m.run) for m in module.modules() if hasattr(m, "run"))
        if option not in seen or k < len(AT[block]):
            seen.add(option)
            yield kind, k


@pytest.mark.slow
@pytest.mark.parametrize("block", AT, ids=lambda block: block.__name__)
def test_every_block_alone(block):
    """Each block with each of its options, behind a layer, in turn with the quantities and losses."""
    groups, first = [g for g in GROUPS if g != "gradient"], [*AT].index(block)
    for kind, k in variants(block):
        asked, choice = ("first order", groups[(first + k) % len(groups)]), BLOCKS[kind].index(block)
        run(Example(SHAPES[kind], ((0, 1), (choice, k)), "plain", (first + k, k), (2 + k % 2, 1), asked, None, k))
