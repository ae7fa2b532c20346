"""What tests/memory_check.sh runs under valgrind: every CPU kernel over odd arguments, and a program with `out=`.

Each part announces itself on standard error, where valgrind writes too, so that what valgrind found can be told apart
by part. Results are compared with the definitions besides. The first part reads beyond an allocation on purpose
(within what the allocator has rounded it up to): valgrind has to say so, or it is not watching.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PLANTED, IMPORT, END = "planted", "import", "end"
MARK = "@@ part: "


def announce(part: str) -> None:
    """Unbuffered, as valgrind's lines are."""
    os.write(2, f"{MARK}{part}\n".encode())


def report(log: Path) -> int:
    """Say what ran and what was found; the exit status."""
    found: dict[str, list[str]] = {}
    part = IMPORT
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith(MARK):
            part = line.removeprefix(MARK)
            found.setdefault(part, [])
        elif re.match(r"==\d+== (Invalid|Mismatched|Process terminating|.*overlap)", line):
            found.setdefault(part, []).append(line)
    if END not in found:
        print(f"memory check: it did not come to its end; the last part was {part}. See {log}")
        return 1
    if not found.pop(PLANTED, None):
        print(f"memory check: the planted read beyond an allocation was not noticed, so nothing would be. See {log}")
        return 1
    wrong = {name: lines for name, lines in found.items() if lines}
    parts = [name for name in found if name not in (IMPORT, END)]
    print(f"memory check: the planted read was noticed; {len(parts)} parts ran: {', '.join(parts)}")
    for name, lines in wrong.items():
        print(f"memory check: {len(lines)} errors in {name}, the first: {lines[0]}")
    print(f"memory check: {'errors, see ' + str(log) if wrong else 'no read or write beyond its memory'}")
    return 1 if wrong else 0


def planted() -> None:
    """Eight bytes more than were asked for: of 16 glibc makes 24. Fewer than a word valgrind lets pass."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    address = libc.malloc(16)
    ctypes.string_at(address, 24)
    libc.free(address)


def main() -> None:
    """All parts."""
    announce(PLANTED)
    planted()
    announce(IMPORT)
    for name, part in parts():
        announce(name)
        count = sum(1 for _ in part())
        print(f"{name}: {count} calls", flush=True)
        assert count
    announce(END)


def parts() -> Iterator[tuple[str, Callable[[], Iterator[Any]]]]:
    """(name, what yields after every call), in the order in which they run."""
    import memory_parts

    yield from memory_parts.PARTS.items()
    for name in ("products", "convolutions", "patches", "layers"):
        with memory_parts.small_blocks():
            yield f"{name} in small blocks", memory_parts.PARTS[name]


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--report":
        sys.exit(report(Path(sys.argv[2])))
    main()
