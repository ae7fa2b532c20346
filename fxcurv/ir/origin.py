"""Where a node comes from: its op, module, the user's line, and the stage that made it."""

from __future__ import annotations

import dis
import inspect
import linecache
import os
import re
import traceback
import types
from typing import Any

import torch
from torch import fx

from fxcurv.ir.private import OpOverload

# Frames of these packages are never the user's line.
_INSIDE = tuple(os.path.dirname(os.path.abspath(p)) + os.sep for p in (torch.__file__, os.path.dirname(__file__)))


def is_user_file(path: str) -> bool:
    """Whether a frame of this file is the user's own code."""
    return not path.startswith((*_INSIDE, "<eval_with_key>", "<frozen", "<string>"))


def is_ours(path: str) -> bool:
    """Whether a frame of this file is the compiler's."""
    return path.startswith(_INSIDE[1])


def locate(node: fx.Node) -> str:
    """Where a node of a captured graph comes from: op, module path and the user's source line."""
    meta = node.meta
    origin = meta.get("origin", {})
    op = origin.get("op") or (node.target if node.op == "call_function" else node.name)
    op = op if isinstance(op, str | OpOverload) else getattr(op, "__name__", op)
    module = origin.get("module") or module_path(node)
    line = source_line(meta.get("stack_trace") or origin.get("stack_trace") or "")
    where = f" in module '{module}'" if module else " in the loss" if origin.get("in_loss") or in_loss(node) else ""
    return f"op {op}{where}" + (f"\n  {line}" if line else "")


def at_loss(node: fx.Node | None) -> str:
    """Where the loss is computed, as the first lines of a message about it; "" where the program does not hold it."""
    return f"{locate(node)}\n" if node is not None and node.op == "call_function" else ""


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost user module that emitted `node` ("" for the model itself)."""
    paths = [path for path in _stack(node) if path.startswith("model.")]
    return paths[-1].removeprefix("model.") if paths else ""


def _stack(node: fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def in_loss(node: fx.Node) -> bool:
    """Whether a node belongs to the loss: the captured module calls the model and the loss, and nothing else."""
    stack = _stack(node)
    return bool(stack) and not any(path.split(".")[0] == "model" for path in stack)


def source_line(trace: str) -> str:
    """The last frame of `trace` that is the user's own, as 'File "x.py", line 3, in forward: code'."""
    lines = trace.strip().splitlines()
    found = ""
    for header, code in zip(lines, [*lines[1:], ""], strict=False):
        frame = re.match(r'\s*File "(.+?)", line \d+', header)
        if frame and is_user_file(frame[1]):
            found = f"{header.strip()}: {code.strip()}"
    return found


def line_of(file: str, number: int, function: str) -> str:
    """A source line in the form of a traceback."""
    return f'  File "{file}", line {number}, in {function}: {linecache.getline(file, number).strip()}\n'


def line_number(code: types.CodeType, at: dis.Instruction | None) -> int:
    """The number of an instruction's line; that of the function's first without one."""
    lines = [line for start, _, line in code.co_lines() if at is not None and start <= at.offset and line is not None]
    return lines[-1] if lines else code.co_firstlineno


def running_line() -> str:
    """The innermost user line that the compiler is running, or that of a PyTorch module if there is none."""
    frames = traceback.extract_stack()
    first = next((k for k, f in enumerate(frames) if is_ours(f.filename)), 0)
    inside = frames[first:]
    theirs = [f for f in inside if is_user_file(f.filename)] or [f for f in inside if not is_ours(f.filename)]
    return _last_line(theirs or [f for f in frames if is_user_file(f.filename)])


def failing_line(error: BaseException) -> str:
    """The innermost user line that an error came through; "" if there is none."""
    return _last_line([f for f in traceback.extract_tb(error.__traceback__) if is_user_file(f.filename)])


def _last_line(frames: list[traceback.FrameSummary]) -> str:
    return line_of(frames[-1].filename, frames[-1].lineno or 0, frames[-1].name) if frames else ""


def line_of_function(fn: Any) -> str:
    """Where a function or a module's forward pass begins; "" if that is not the user's code."""
    fn = inspect.unwrap(getattr(fn, "forward", fn))
    code = getattr(getattr(fn, "__func__", getattr(fn, "func", fn)), "__code__", None)
    return (
        line_of(code.co_filename, code.co_firstlineno, code.co_name) if code and is_user_file(code.co_filename) else ""
    )


STAGES = {
    "forward": "forward pass",
    "columns": "columns at the loss",
    "propagate": "backward walk",
    "results": "quantities",
}


def stage_of(node: fx.Node) -> str:
    """The stage that made a node, a key of `STAGES`; `extract` and `select` are both "results"."""
    if "origin" not in node.meta:
        return "forward"
    stage = node.meta["origin"].get("stage", "results")
    return stage if stage in STAGES else "results"


def origin_of(node: fx.Node, stage: str, **more: Any) -> dict[str, Any]:
    """Provenance for nodes that a pass makes out of `node`."""
    known = node.meta.get("origin", {})
    return {
        "op": known.get("op") or str(node.target),
        "module": known.get("module") or module_path(node),
        "stack_trace": known.get("stack_trace") or node.meta.get("stack_trace", ""),
        "in_loss": known.get("in_loss") or in_loss(node),
        "stage": stage,
        **more,
    }
