"""What people train, by real packages, against the oracle; a package that is not installed skips its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from coverage_packages import SIZES
from packages import PACKAGES, REFUSED, as_imported

from fxcurv.errors import FxcurvError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def needed(name: str) -> None:
    package = PACKAGES[name][0]
    pytest.importorskip(package, reason=f"checks models of {package}, of the extra `models`")


@pytest.mark.parametrize("name", PACKAGES)
def test_equals_the_oracle(name: str) -> None:
    needed(name)
    _, row = PACKAGES[name]
    asked = [family for family in row.asks.split() if (name, family) not in REFUSED]
    if (name, "grad") not in REFUSED:
        for training in (False, True) if row.trains else (False,):
            with as_imported():
                replace(row, asks=" ".join(asked or ["grad"])).check(SIZES, training)


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_refused(name: str, family: str) -> None:
    needed(name)
    error, words = REFUSED[name, family]
    with as_imported(), pytest.raises(FxcurvError, match=words) as caught:
        replace(PACKAGES[name][1], asks=family).check((3,))
    assert type(caught.value) is error
