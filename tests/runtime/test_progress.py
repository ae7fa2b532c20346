"""The line that a long compilation shows."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import fxcurv
from fxcurv.runtime import progress


@pytest.fixture
def terminal(monkeypatch):
    """What is written to a terminal that fxcurv thinks it has."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=out, force_terminal=True, width=80))
    return out


def compile_something():
    fxcurv.compile(nn.Linear(3, 2), nn.MSELoss()).lower(torch.randn(4, 3), torch.randn(4, 2))


def test_a_long_compilation_names_the_model_and_its_step(terminal, monkeypatch):
    monkeypatch.setattr(progress.progress.__wrapped__, "__defaults__", (0.0,))
    compile_something()
    assert "compiling Linear" in terminal.getvalue()


def test_a_step_is_named(terminal):
    with progress.progress("compiling X", patience=0.0) as tell:
        tell("capture")
        progress.threading.Event().wait(0.3)
        tell("select")
        progress.threading.Event().wait(0.3)
    assert "compiling X: capture" in terminal.getvalue()
    assert "compiling X: select" in terminal.getvalue()


def test_a_short_one_is_silent(terminal, monkeypatch):
    monkeypatch.setattr(progress.progress.__wrapped__, "__defaults__", (600.0,))
    compile_something()
    assert terminal.getvalue() == ""


def test_nothing_is_shown_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress.progress.__wrapped__, "__defaults__", (0.0,))
    compile_something()
    assert capsys.readouterr() == ("", "")
