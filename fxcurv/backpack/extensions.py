"""The extensions, under BackPACK's names."""

from fxcurv.extensions import *  # noqa: F403
from fxcurv.extensions import __all__  # noqa: F401
