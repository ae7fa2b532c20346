"""Programs that outlive the process: a file for each in the folder `fxcurv.cache_dir`.

A file's name is a digest of all that is known of a call without tracing: versions, the processor, PyTorch's state, extensions and
options, kinds of arguments, structure and code of the model and the loss. In the file is what tracing read of Python, and the
code that ran (`front.portable`), which have to hold where it is read; then the program (`runtime.written`). What cannot be
compared in another process with certainty is not kept, and the report says why. A program that was read is held against plain
PyTorch at its first call, as one that was made; where it differs its file is deleted, and the program made anew.

Nothing that goes wrong here breaks a call: a file that cannot be read is warned of once, and written again.
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

# Of the file's form. A file of another one has another name, so that it is neither read nor written over.
FORM = 2
_FIRST = b"fxcurv "
# Files in the folder: beyond, those that were used last are kept.
MOST = 512
# Seconds, after which what a process began to write is taken for left behind.
DAY = 86_400
_VERSIONS = ("numpy", "sympy", "networkx", "triton")
# What a user adds to the compiler is in no file: the tables as they are once it is imported.
_OWN = compiler()


def folder(path: str | os.PathLike[str] | None) -> Disk | None:
    """The folder of this path, which is made when it is needed.

    Raises:
        ArgumentError: for what is no path.
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
        """A program for these arguments and what Python holds, if there is one in the folder."""
        try:
            name = digest(request, key, extensions, options)
            sizes = "any", request.arguments.batch_size
            files = [file for size in sizes for file in sorted(self.path.glob(f"{name}-{size}-*.fxcurv"))]
        except Exception:  # also of the user's objects, which are looked at: `keep` says why
            return None
        for file in files:
            if str(file) not in self._set_aside:
                found = self._read(file, name, request, extensions, options)
                if found is not None:
                    return found
        return None

    def _read(self, file: Path, name: str, request: Request, extensions: tuple, options: Options) -> Ready | None:
        try:
            found = _opened(file, name, request, extensions, options)
        except Exception as error:  # whatever a file that is cut off, or made by hand, leads to
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
        """Write a program down that has served a call, or note why not."""
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
        except Exception as error:  # of the user's objects, which are looked at
            ready.kept = f"not kept, because of an error: {type(error).__name__}: {error}"
        ready.program.notes = [*ready.program.notes, f"on disk: {ready.kept}"]
        log.info("on disk: %s", ready.kept)

    def distrust(self, ready: Ready, wrong: bool) -> None:
        """Read this one's file no more; `wrong`: delete it."""
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
        """Under another name first, so that nobody reads half of it."""
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
    """(a line with the digest of the rest, a line of JSON, and constants as `torch.save` writes them; what it holds of Python).

    Raises:
        NotPortable, Unwritable: see there.
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
    live = _live(program, subject)
    held = {name: t for name, t in program.constants.items() if name not in live}
    python = portable(program.python, subject, held.values())
    described = {"name": name, "python": python, "program": written(program, noted)}
    blob = io.BytesIO()
    torch.save(held, blob)
    rest = json.dumps(described).encode() + b"\n" + (blob.getvalue() if held else b"")
    return _FIRST + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest, json.dumps(python).encode()


def _live(program: Program, subject: Any) -> dict[str, Tensor]:
    """Constants that places in Python, and a loss that is a module, hold."""
    of_loss = dict(tensors_in(subject.loss)) if isinstance(subject.loss, nn.Module) else {}
    found = {i.name: of_loss.get(i.name.removeprefix("loss.")) for i in program.inputs if i.kind == "constant"}
    live = {name: t for name, t in found.items() if t is not None}
    return {**live, **program.python.tensors(subject.modules())}


def _opened(file: Path, name: str, request: Request, extensions: tuple, options: Options) -> Ready | str:
    """What is in a file, or in words why it does not serve.

    Raises:
        Exception: of any kind, for a file that is none.
    """
    head, _, rest = file.read_bytes().partition(b"\n")
    if head != _FIRST + hashlib.sha256(rest).hexdigest().encode():
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
    program.constants = {**held, **_live(program, request.subject)}
    check = SelfCheck.again(program, *noted) if noted is not None else None
    made = f"; checked when it was made: {noted[2]}" if noted is not None else ""
    program.notes = [*program.notes, f"on disk: read from {file.parent}{made}"]
    return Ready(program, Storage(program), None, check, kept="read", loaded=str(file))


# ---- its name ------------------------------


def digest(request: Request, key: Key, extensions: tuple, options: Options) -> str:
    """Of all that a program is known to depend on before it is made.

    Raises:
        NotPortable: for what cannot be compared in another process.
    """
    subject, arguments = request.subject, request.arguments
    if compiler() != _OWN:
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
        [_laid_out(t) for t in (*arguments.inputs, *arguments.targets, *tensors)],
        [(f"{kind.__module__}.{kind.__qualname__}", training) for kind, training in key.modules],
        [code_of(m.forward) for m in subject.modules()], _nested(subject), describe(subject.loss),
    ]  # fmt: skip
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


def _nested(subject: Any) -> list[list[tuple[str, int]]]:
    """Every name that a module has, with the number of the module, which has a name for every place where it is held."""
    number = {id(m): k for k, m in enumerate(subject.modules())}
    return [
        [(name, number[id(m)]) for name, m in root.named_modules(remove_duplicate=False)] for root in subject.roots()
    ]


def _ties(subject: Any) -> list[list[str]]:
    """The names of every parameter and buffer, those of one tensor together."""
    names: dict[int, list[str]] = {}
    for k, root in enumerate(subject.roots()):
        named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
        for name, t in named:
            names.setdefault(id(t), []).append(f"{k}.{name}")
    return list(names.values())


def _laid_out(t: Tensor) -> tuple:
    """The order of a tensor's dimensions in memory, and whether that is dense; programs are one for all other strides."""
    order = sorted(range(t.ndim), key=lambda d: (-t.stride(d), d))
    return type(t).__name__, t.requires_grad, t.is_contiguous(), tuple(order)


@functools.cache
def _process() -> tuple:
    """The versions of all that computes, and the processor."""
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
    """A digest of fxcurv itself: another state of a working tree has the same version."""
    root = Path(__file__).parent.parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found.hexdigest()
