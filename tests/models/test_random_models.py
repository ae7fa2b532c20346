"""Random models against the oracle: a few by default, more among the slow tests; `random_models.py` runs thousands."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from random_blocks import BLOCKS
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


@pytest.mark.slow
@pytest.mark.parametrize("variant", range(18))
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_alone(kind, variant):
    """Each block with each of its options, behind a layer, in turn with the quantities and losses."""
    shape, groups = {1: (3,), 2: (3, 3), 3: (2, 4, 3)}[kind], [g for g in GROUPS if g != "gradient"]
    for choice in range(len(BLOCKS[kind])):
        asked = ("first order", groups[(choice + variant) % len(groups)])
        loss = (choice + variant, variant)
        run(Example(shape, ((0, 1), (choice, variant)), "plain", loss, (2 + variant % 2, 1), asked, None, variant))
