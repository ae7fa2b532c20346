"""All cases: `CASES`, a dict from names to `Case`; importing a module of cases fills it."""

import cases_images  # noqa: F401
import cases_losses  # noqa: F401
import cases_models  # noqa: F401
import cases_modules  # noqa: F401
import cases_sequences  # noqa: F401
from case_tools import CASES, Case

__all__ = ["CASES", "Case"]
