"""Programs that outlive the process: a file for each in the folder `fxcurv.cache_dir`.

A file's name is a digest of all that is known of a call without tracing: versions, the processor, PyTorch's state,
extensions and options, kinds of arguments, structure and code of the model and the loss. The file holds the Python
values that tracing read and the code that ran (`front.portable`), which must be the same where it is read, and the
program (`runtime.written`). A program that depends on something that another process cannot compare with certainty is
not kept, and the report says why. A program that was read is compared with plain PyTorch at its first call, like a new
one; if it differs, its file is deleted and the program made anew.

Nothing that goes wrong here breaks a call: a file that cannot be read causes one warning, and is written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.cost import machine
from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import Rows
from fxcurv.front.portable import Describer, NotPortable, checked_modules, code_of, portable, restored
from fxcurv.front.requests import Request, tensors_in
from fxcurv.ir.pieces import state_of_torch
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program
from fxcurv.ir.state import Options
from fxcurv.runtime.keys import Key
from fxcurv.runtime.lengths import serves
from fxcurv.runtime.memory import Storage
from fxcurv.runtime.programs import Ready
from fxcurv.runtime.selfcheck import SelfCheck
from fxcurv.runtime.shared import PLAIN, compiler, is_own
from fxcurv.runtime.written import Unwritable, read, written

log = logging.getLogger("fxcurv")

# Version of the file format. Files of another version have other names, so they are neither read nor overwritten.
FORM = 2
_MAGIC = b"fxcurv "
# Most files in the folder: of more, those that were used last are kept.
MOST = 512
# Seconds after which a file that was not finished counts as abandoned.
DAY = 86_400
_VERSIONS = ("numpy", "sympy", "networkx", "triton")
# The compiler's tables right after import: with what a user adds to them, no program is kept.
_BUILT_IN = compiler()


def folder(path: str | os.PathLike[str] | None) -> Disk | None:
    """The folder at this path, None without one; it is made when it is needed.

    Raises:
        ArgumentError: if `path` is no path.
    """
    if path is not None and not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"fxcurv.cache_dir = {path!r}: set it to a path, or None")
    return Disk(Path(path).expanduser()) if path else None


class Disk:
    """A folder of programs.

    Attributes:
        warned: whether the one warning was given.
    """

    def __init__(self, path: Path):
        self.path = path
        self.warned = False
        self._set_aside: set[str] = set()

    def find(self, request: Request, key: Key, extensions: tuple, options: Options) -> Ready | None:
        """The program for these arguments and the present Python values, if there is one in the folder."""
        try:
            name = digest(request, key, extensions, options)
            sizes = "any", request.arguments.batch_size
            files = [file for size in sizes for file in sorted(self.path.glob(f"{name}-{size}-*.fxcurv"))]
        except Exception:  # the user's objects are inspected, and may raise anything: `keep` says why
            return None
        for file in files:
            if str(file) not in self._set_aside:
                found = self._read(file, name, request, extensions, options)
                if found is not None:
                    return found
        return None

    def _read(self, file: Path, name: str, request: Request, extensions: tuple, options: Options) -> Ready | None:
        try:
            found = _load(file, name, request, extensions, options)
        except Exception as error:  # a file that is cut off, or made by hand, may raise anything
            self._set_aside.add(str(file))
            self._warn(f"{file} cannot be read ({type(error).__name__}: {error}): the program is made anew")
            return None
        if isinstance(found, str):
            log.info("%s does not serve: %s", file.name, found)
            return None
        with contextlib.suppress(OSError):
            os.utime(file)
        log.info("taken from %s", file)
        return found

    def keep(self, ready: Ready, request: Request, key: Key, extensions: tuple, options: Options) -> None:
        """Write a program that has served a call to the folder, or note why not."""
        try:
            name = digest(request, key, extensions, options)
            content, guarded = _content(ready, name, request)
            size = ready.program.batch.size if ready.program.fixed else "any"
            file = self.path / f"{name}-{size}-{hashlib.sha256(guarded).hexdigest()[:16]}.fxcurv"
            self._write(file, content)
            ready.kept = f"kept in {self.path}"
            self._set_aside.discard(str(file))
        except (NotPortable, Unwritable) as error:
            ready.kept = f"not kept, because {error}"
        except OSError as error:
            ready.kept = f"not kept, because {error}"
            self._warn(f"programs cannot be kept in {self.path} ({error})")
        except Exception as error:  # the user's objects are inspected, and may raise anything
            ready.kept = f"not kept, because of an error: {type(error).__name__}: {error}"
        ready.program.notes = [*ready.program.notes, f"on disk: {ready.kept}"]
        log.info("on disk: %s", ready.kept)

    def distrust(self, ready: Ready, wrong: bool) -> None:
        """Never read this program's file again; `wrong`: delete it."""
        self._set_aside.add(ready.loaded)
        log.info("%s is set aside", ready.loaded)
        if wrong:
            warnings.warn(
                f"{ready.loaded} holds a program that is not this model's, by the check of its first call: it is deleted, and "
                "the program made anew. Please report it.",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            with contextlib.suppress(OSError):
                os.remove(ready.loaded)

    def _write(self, file: Path, content: bytes) -> None:
        """Write under another name first, so that nobody reads half a file."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(content)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(name)
            raise
        self._tidy()

    def _tidy(self) -> None:
        files = sorted((f.stat().st_mtime, str(f)) for f in self.path.glob("*.fxcurv"))
        halves = [(at, str(f)) for f in self.path.glob("*.part") if (at := f.stat().st_mtime) < time.time() - DAY]
        for _, name in [*halves, *files[: max(len(files) - MOST, 0)]]:
            with contextlib.suppress(OSError):
                os.remove(name)

    def _warn(self, message: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(message, RuntimeWarning, stacklevel=2)


# ---- a file ------------------------------


def _content(ready: Ready, name: str, request: Request) -> tuple[bytes, bytes]:
    """(the file: a line with the digest of the rest, a line of JSON, constants by `torch.save`; its part about Python).

    Raises:
        NotPortable, Unwritable: if a file cannot hold the Python values or the program.
    """
    program, subject = ready.program, request.subject
    if (
        program.options.check not in (None, "first")
        or program.options.debug
        or program.options.sample_index is not None
    ):
        raise Unwritable("check= is another than 'first', or debug= or sample_index= is set")
    check = ready.selfcheck
    noted = (check.random, check.jacobian, check.note) if check is not None else None
    live = _live_constants(program, subject)
    held = {name: t for name, t in program.constants.items() if name not in live}
    python = portable(program.python, subject, held.values())
    described = {"name": name, "python": python, "program": written(program, noted)}
    blob = io.BytesIO()
    torch.save(held, blob)
    rest = json.dumps(described).encode() + b"\n" + (blob.getvalue() if held else b"")
    return _MAGIC + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest, json.dumps(python).encode()


def _live_constants(program: Program, subject: Any) -> dict[str, Tensor]:
    """The constants that Python values, or a loss that is a module, hold: they are in no file."""
    of_loss = dict(tensors_in(subject.loss)) if isinstance(subject.loss, nn.Module) else {}
    found = {i.name: of_loss.get(i.name.removeprefix("loss.")) for i in program.inputs if i.kind == "constant"}
    live = {name: t for name, t in found.items() if t is not None}
    return {**live, **program.python.tensors(subject.modules())}


def _load(file: Path, name: str, request: Request, extensions: tuple, options: Options) -> Ready | str:
    """The program in a file, or a text that says why it does not serve.

    Raises:
        Exception: of any kind, for a file that was not written here, or was changed since.
    """
    head, _, rest = file.read_bytes().partition(b"\n")
    if head != _MAGIC + hashlib.sha256(rest).hexdigest().encode():
        raise ValueError("it is not as it was written")
    text, _, blob = rest.partition(b"\n")
    described = json.loads(text)
    if described["name"] != name:
        raise ValueError("it was written under another name")
    python = restored(described["python"], request.subject)
    if isinstance(python, str):
        return python
    program, noted = read(described["program"], extensions, options)
    program.python = python
    if not serves(program, request.arguments):
        return f"it is not of {request.arguments.batch_size} samples"
    held = torch.load(io.BytesIO(blob), weights_only=True) if blob else {}
    program.constants = {**held, **_live_constants(program, request.subject)}
    check = SelfCheck.again(program, *noted) if noted is not None else None
    made = f"; checked when it was made: {noted[2]}" if noted is not None else ""
    program.notes = [*program.notes, f"on disk: read from {file.parent}{made}"]
    return Ready(program, Storage(program), None, check, kept="read", loaded=str(file))


# ---- its name ------------------------------


def digest(request: Request, key: Key, extensions: tuple, options: Options) -> str:
    """A digest of all that a program is known to depend on before it is made.

    Raises:
        NotPortable: if something cannot be compared in another process.
    """
    subject, arguments = request.subject, request.arguments
    if compiler() != _BUILT_IN:
        raise NotPortable("rules, kinds of columns or passes were added to the compiler")
    foreign = [type(e).__name__ for e in extensions if not is_own(e)]
    if foreign:
        raise NotPortable(f"{foreign[0]} is an extension of the user's, or holds what is compared by identity")
    if options.rules or options.ranks or request.sharded or any(arguments.varying):
        raise NotPortable("rules=, mesh=, outputs=False or symbolic sizes were asked for")
    if any(pytree.tree_leaves(key.hooks)):
        raise NotPortable("there are hooks on modules")
    asked = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "rules"}
    if not all(isinstance(v, (*PLAIN, float, Rows)) for v in pytree.tree_leaves([*asked.values()])):
        raise NotPortable("an option is a function, or another object")
    checked_modules(subject)
    describe = Describer(subject)
    tensors = [t for root in subject.roots() for _, t in tensors_in(root)]
    said = [
        FORM, _process(), state_of_torch(), str(machine(subject.device())), request.mode, request.create_graph,
        subject.loss_params, subject.watched, [(type(e).__qualname__, describe(e)) for e in extensions], describe(asked),
        key.inputs, key.targets,
        describe([arguments.input_template, arguments.target_template, arguments.batch_dims, arguments.rows]),
        (arguments.index, arguments.edges, key.single, key.dtype), key.tensors, _ties(subject),
        [_layout_of(t) for t in (*arguments.inputs, *arguments.targets, *tensors)],
        [(f"{kind.__module__}.{kind.__qualname__}", training) for kind, training in key.modules],
        [code_of(m.forward) for m in subject.modules()], _module_names(subject), describe(subject.loss),
    ]  # fmt: skip
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


def _module_names(subject: Any) -> list[list[tuple[str, int]]]:
    """(name, number of the module) for every name of every module: a module in several places has several names."""
    number = {id(m): k for k, m in enumerate(subject.modules())}
    return [
        [(name, number[id(m)]) for name, m in root.named_modules(remove_duplicate=False)] for root in subject.roots()
    ]


def _ties(subject: Any) -> list[list[str]]:
    """The names of all parameters and buffers, grouped by tensor."""
    names: dict[int, list[str]] = {}
    for k, root in enumerate(subject.roots()):
        named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
        for name, t in named:
            names.setdefault(id(t), []).append(f"{k}.{name}")
    return list(names.values())


def _layout_of(t: Tensor) -> tuple:
    """A tensor's class, requires_grad, contiguity and order of dimensions in memory; exact strides do not matter."""
    order = sorted(range(t.ndim), key=lambda d: (-t.stride(d), d))
    return type(t).__name__, t.requires_grad, t.is_contiguous(), tuple(order)


@functools.cache
def _process() -> tuple:
    """The versions of the software that computes, and the processor."""
    found = [_version(name) for name in _VERSIONS]
    processor = platform.machine(), torch.backends.cpu.get_cpu_capability(), platform.system()
    return (
        sys.version,
        str(torch.__version__),
        torch.version.git_version,
        torch.version.cuda,
        *found,
        processor,
        _sources(),
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sources() -> str:
    """A digest of fxcurv's sources: a working tree may change without its version."""
    root = Path(__file__).parent.parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found.hexdigest()
