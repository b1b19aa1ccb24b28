# SPDX-License-Identifier: Apache-2.0
"""Options of methods against their annotations, so that a wrong type is refused in one sentence."""

from __future__ import annotations

import dataclasses
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def fits(value: Any, wanted: Any) -> bool:
    """Whether ``value`` is of the type that the annotation ``wanted`` names; True where that cannot be told.

    An int will do for a float, a bool for neither.
    """
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = parts[:1] * len(value) if parts[-1:] == (...,) else parts
        return len(each) == len(value) and all(fits(v, part) for v, part in zip(value, each, strict=True))
    if wanted in (int, float):
        return isinstance(value, (int, wanted)) and not isinstance(value, bool)
    try:
        return isinstance(value, origin or wanted)
    except TypeError:  # Any, and what only type checkers understand
        return True


def tuples_of_lists(options: Any) -> None:
    """Make tuples of the lists in a dataclass ``options`` that wants tuples: a saved configuration has no tuples."""
    for name, wanted in _annotations(type(options)).items():
        value = getattr(options, name)
        if isinstance(value, list) and not fits(value, wanted) and fits(_tuple_of(value), wanted):
            object.__setattr__(options, name, _tuple_of(value))


def _tuple_of(value: Any) -> Any:
    return tuple(_tuple_of(part) for part in value) if isinstance(value, list) else value


def check_types(options: Any, owner: str) -> None:
    """Raise ``ValueError`` in one sentence unless every field of the dataclass ``options`` is of its type."""
    for name, wanted in _annotations(type(options)).items():
        value = getattr(options, name)
        if not fits(value, wanted):
            words = wanted.__name__ if isinstance(wanted, type) and not get_args(wanted) else str(wanted)
            raise ValueError(f"The option {name} of '{owner}' takes {words}, not {value!r}.")


@cache
def _annotations(cls: type) -> dict[str, Any]:
    """The annotation of every field, by name; nothing for a class whose annotations cannot be looked up."""
    try:
        hints = get_type_hints(cls)
    except (NameError, AttributeError, TypeError):  # names that are only there for type checkers
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
