"""The base class of extensions, under BackPACK's name and path."""

from fxcurv.extensions import Extension as BackpropExtension

__all__ = ["BackpropExtension"]
