"""The base classes of extensions, under BackPACK's names and path."""

from fxcurv.backpack.extensions.module_extension import (
    FAIL_ERROR,
    FAIL_SILENT,
    FAIL_WARN,
    BackpropExtension,
    FirstOrderBackpropExtension,
    SecondOrderBackpropExtension,
)

__all__ = [
    "FAIL_ERROR", "FAIL_SILENT", "FAIL_WARN", "BackpropExtension", "FirstOrderBackpropExtension", "SecondOrderBackpropExtension",
]  # fmt: skip
