"""A case compiled, beside its oracle."""

import torch
from oracle import Oracle

import fxcurv


def compiled_case(case, extensions, **kwargs):
    model, loss, inputs, targets = case.build()
    # the oracle checks more; extensions/test_quantities.py runs the program's own check on all cases
    kwargs.setdefault("check", None)
    compiled = fxcurv.compile(model, loss, extensions, batch_dim=case.batch_dim, debug=True, **kwargs)
    arguments = (inputs,) if targets is None else (inputs, targets)
    return compiled, arguments, Oracle(model, loss, inputs, targets, **case.oracle)


def close(actual, expected, name):
    assert set(actual) == set(expected), name
    for param, value in expected.items():
        torch.testing.assert_close(
            actual[param], value, rtol=1e-7, atol=1e-10, equal_nan=True, msg=lambda m, p=param: f"{name} of {p}: {m}"
        )
