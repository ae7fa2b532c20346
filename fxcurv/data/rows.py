"""Values per sample, collected batch after batch: in memory, or in a file that grows.

The file is a `.npy` file, raw numbers behind a header that is written at the end. So the number of samples need not be
known in advance, the file can be cut back to any length that it had, and `numpy.load(mmap_mode="r")` maps it. (A
safetensors file has all sizes in front, so it could not grow.)
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcurv.errors import ArgumentError

HEADER = 256
MAGIC = b"\x93NUMPY"
CHUNK = 1 << 22


class Rows:
    """Values per sample, in order.

    Args:
        file: where they are written; None: they stay in memory.
        axis: the axis of the samples in a value.
    """

    def __init__(self, file: Path | None, axis: int):
        self.file, self.axis = file, axis
        self._parts: list[tuple[int, Tensor]] = []  # (the number of rows up to its end, rows)
        self._shape: list[int] | None = None  # of one row
        self._dtype = ""

    def add(self, value: Tensor, factor: float | None, before: int) -> None:
        """Append the rows of a batch, times a factor, behind the first `before` rows."""
        rows = value.detach().movedim(self.axis, 0)
        rows = rows * factor if factor is not None else rows.clone()
        if self._shape is None:
            self._shape = list(rows.shape[1:])
        if list(rows.shape[1:]) != self._shape:
            raise ArgumentError(
                f"a batch has values of shape {list(rows.shape[1:])} per sample, the ones before it {self._shape}: sort the "
                "data by shape, or pad it"
            )
        if self.file is None:
            self._kept(before).append((before + len(rows), rows))
            return
        rows = rows.cpu()
        array = (rows.float() if rows.dtype == torch.bfloat16 else rows).contiguous().numpy()
        self._dtype = array.dtype.str
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "r+b" if self.file.exists() else "w+b") as f:
            if not before:
                f.write(bytes(HEADER))  # over that of an earlier pass, if the file is from one
            f.truncate(HEADER + before * self._row_bytes())
            f.seek(0, os.SEEK_END)
            f.write(array.tobytes())

    def _kept(self, count: int) -> list[tuple[int, Tensor]]:
        """The parts with the first `count` rows: the last batch may have failed after it was added here."""
        while self._parts and self._parts[-1][0] > count:
            self._parts.pop()
        return self._parts

    def _row_bytes(self) -> int:
        return math.prod(self._shape or ()) * np.dtype(self._dtype).itemsize

    def finish(self, divisor: float, count: int) -> Tensor:
        """All rows divided by `divisor`, with the samples along `axis` as in the values."""
        if self.file is None:
            return (torch.cat([rows for _, rows in self._kept(count)]) / divisor).movedim(0, self.axis)
        self._check_open()
        shape = (count, *(self._shape or ()))
        os.truncate(self.file, HEADER + count * self._row_bytes())
        self._write_header(shape)
        if divisor != 1 and math.prod(shape):
            self._divide(self.file, divisor, math.prod(shape))
        return self._mapped(self.file, shape)

    def _mapped(self, file: Path, shape: tuple[int, ...]) -> Tensor:
        """All rows of a finished file, as a tensor that reads from it."""
        if not math.prod(shape):
            return torch.from_numpy(np.empty(shape, self._dtype)).movedim(0, self.axis)
        found = np.memmap(file, self._dtype, "c", HEADER, shape)  # writing to the tensor leaves the file as it is
        return torch.from_numpy(found).movedim(0, self.axis)

    def _check_open(self) -> None:
        """Refuse a file with a header. It is written before rows are divided, so that none is divided twice."""
        with open(self.file, "rb") as f:  # type: ignore[arg-type]
            if f.read(len(MAGIC)) == MAGIC:
                raise ArgumentError(
                    f"{self.file} was being finished when the pass was interrupted: begin anew, with no state"
                )

    def _divide(self, file: Path, divisor: float, count: int) -> None:
        flat = np.memmap(file, self._dtype, "r+", HEADER, (count,))
        for start in range(0, count, CHUNK):
            flat[start : start + CHUNK] /= divisor
        flat.flush()

    def _write_header(self, shape: tuple[int, ...]) -> None:
        known = {"descr": self._dtype, "fortran_order": False, "shape": shape}
        text = repr(known).ljust(HEADER - 11) + "\n"
        with open(self.file, "r+b") as f:  # type: ignore[arg-type]
            f.write(MAGIC + b"\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.encode())

    def state_dict(self) -> dict[str, Any]:
        """The rows in memory, or the form of those in the file."""
        return {
            "file": self.file.name if self.file is not None else None,
            "axis": self.axis, "shape": self._shape, "dtype": self._dtype, "parts": [rows for _, rows in self._parts],
        }  # fmt: skip

    @staticmethod
    def finished(state: dict[str, Any], count: int, folder: Path | None) -> Tensor:
        """What `finish` gave for `count` rows in a file, from the `state_dict` of that time.

        Raises:
            ArgumentError: if the file is gone, or is another one.
        """
        rows = Rows._in(state, folder)
        file: Any = rows.file
        if file.stat().st_size != HEADER + count * rows._row_bytes():
            raise ArgumentError(f"{file} has other rows than the state says: begin anew, with no state")
        return rows._mapped(file, (count, *(state["shape"] or ())))

    @staticmethod
    def of(state: dict[str, Any], folder: Path | None) -> Rows:
        """Restore rows from a `state_dict`, with their file in `folder`.

        Raises:
            ArgumentError: if rows are in a file and there is no folder, or the file is gone or finished.
        """
        rows, end = Rows._in(state, folder), 0
        for part in state["parts"]:
            end += len(part)
            rows._parts.append((end, part))
        if rows.file is not None:
            rows._check_open()
        return rows

    @staticmethod
    def _in(state: dict[str, Any], folder: Path | None) -> Rows:
        """Rows without those in memory."""
        if (state["file"] is None) != (folder is None):
            raise ArgumentError("the state has rows in files, or has none, and to= says otherwise: pass the same to=")
        file = folder / state["file"] if folder is not None else None
        if file is not None and not file.exists():
            raise ArgumentError(f"the state has rows in {file}, which is not there: pass the same to=, or begin anew")
        rows = Rows(file, state["axis"])
        rows._shape, rows._dtype = state["shape"], state["dtype"]
        return rows
