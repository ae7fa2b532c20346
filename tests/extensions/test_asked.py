"""The lists of extensions that tests take have them all."""

import asked
from case_tools import mlp

from fxcurv import extensions


def test_every_public_extension_is_asked_for():
    public = {getattr(extensions, name) for name in extensions.__all__} - {extensions.Extension, extensions.Param}
    assert {type(e) for e in asked.every(mlp())} == public
