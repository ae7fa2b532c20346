"""`params=`: a subset of the parameters, by name, by prefix or pattern, or by a predicate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import nn

Choice = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


class Named(Protocol):
    """An object that has parameters by name: a module, or a model with its loss."""

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter): every parameter once, or once for each of its names."""
        ...


def hashable(choice: Choice, error: type[Exception], whose: str) -> Any:
    """`choice` with a list as a tuple.

    Raises:
        error: if it is neither a string, several of them, nor a predicate.
    """
    if choice is None or isinstance(choice, str) or (callable(choice) and not isinstance(choice, nn.Module | type)):
        return choice
    if isinstance(choice, list | tuple | set | frozenset) and choice and all(isinstance(c, str) for c in choice):
        return tuple(choice)
    raise error(
        f"{whose}(params={choice!r}): pass a name, a prefix or pattern ('head', 'encoder.*'), a list of these, or a "
        "predicate (name, parameter) -> bool"
    )


def chosen(
    choice: Any, model: Named, error: type[Exception], whose: str, among: Collection[str] | None = None
) -> list[str]:
    """The trainable parameters that `choice` selects, as `model.named_parameters()` names and orders them.

    Args:
        choice: from `hashable`; None means all.
        among: names of the parameters to choose from (None: all that are trainable).

    Raises:
        error: if a name or pattern matches none of them, or a predicate selects none.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    aliases: dict[str, list[str]] = {}
    for alias, p in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(names[id(p)], []).append(alias)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad and (among is None or n in among)]
    if choice is None:
        return trainable
    if callable(choice):
        held = dict(model.named_parameters())
        found = {n for n in trainable if any(choice(alias, held[n]) for alias in aliases[n])}
        if not found:
            raise error(f"{whose}: the predicate takes none of the trainable parameters {trainable}")
        return [n for n in trainable if n in found]
    found = set()
    for pattern in [choice] if isinstance(choice, str) else choice:
        matching = [n for n in aliases if any(_matches(alias, pattern) for alias in aliases[n])]
        if not set(matching) & set(trainable):
            raise error(f"{whose}: params='{pattern}' matches {_suggestion(pattern, matching, aliases)}")
        found |= set(matching)
    return [n for n in trainable if n in found]


def _prefixes(name: str) -> Iterator[str]:
    """'a.b.weight' -> 'a', 'a.b', 'a.b.weight'."""
    parts = name.split(".")
    return (".".join(parts[: k + 1]) for k in range(len(parts)))


def _matches(name: str, pattern: str) -> bool:
    return any(prefix == pattern or fnmatchcase(prefix, pattern) for prefix in _prefixes(name))


def _suggestion(pattern: str, matching: list[str], aliases: dict[str, list[str]]) -> str:
    if matching:
        return f"no trainable parameter: {matching} are frozen, or left out by compile(params=...)"
    known = dict.fromkeys(prefix for every in aliases.values() for alias in every for prefix in _prefixes(alias))
    close = difflib.get_close_matches(pattern.removesuffix(".*"), known, 3)
    return f"no parameter; close are {close}" if close else f"no parameter: the model has {list(aliases)}"
