"""What people train, by real packages, against the oracle; a package that is not installed skips its rows."""

from __future__ import annotations

import pytest
from coverage_packages import jobs_of, sizes_of, tolerance_of
from package_checks import LEFT, check
from packages import PACKAGES, PARTS, REFUSED, as_imported

from fxcurv.errors import FxcurvError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def needed(name: str) -> None:
    package = PACKAGES[name][0]
    pytest.importorskip(package, reason=f"checks models of {package}, of the extra `models`")


@pytest.mark.parametrize(("name", "job"), [(name, job) for name in PACKAGES for job in range(len(jobs_of(name)))])
def test_equals_the_oracle(name: str, job: int) -> None:
    needed(name)
    mode, families = jobs_of(name)[job]
    asked = [LEFT[f] if (name, f) in PARTS else f for f in families if (name, f) not in REFUSED]
    if asked and (name, "gradient") not in REFUSED:
        with as_imported():
            check(PACKAGES[name][1], asked, sizes_of(name, asked), mode == "train", tolerance_of(name))


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_refused(name: str, family: str, capfd: pytest.CaptureFixture) -> None:
    needed(name)
    error, words = REFUSED[name, family]
    with as_imported(), pytest.raises(FxcurvError, match=words) as caught:
        check(PACKAGES[name][1], [family], (3,), False)
    assert type(caught.value) is error
    assert capfd.readouterr().err == ""
