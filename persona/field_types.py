"""Checks that what was read from JSON has the types that a dataclass declares."""

import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_field_types(record: object) -> None:
    """Raises TypeError when a field of a dataclass, or of one in it, has another type than declared.

    A whole number may stand for a float, as JSON has only one kind of number, but NaN and infinity may not.
    """
    for name, hint in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, hint):
            raise TypeError(f"{name} must be {_described(hint)}, not {str(value)[:40]!r}")


def _fits(value: Any, hint: Any) -> bool:
    kind, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in inside)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in value.items())
    if kind in (list, tuple):
        return isinstance(value, kind) and all(_fits(one, inside[0]) for one in value)
    if is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            check_field_types(value)
            return True
        return False
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
