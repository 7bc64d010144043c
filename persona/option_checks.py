"""Checks that the classes of options share; their messages name the flag of a field."""

import math

from persona.errors import UsageError


def check_at_least(options: object, least: int, *names: str) -> None:
    """Raises UsageError for a field below `least`; None is allowed."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"{given(options, name)}: must be {least} or more")


def check_above_zero(options: object, *names: str, note: str = "") -> None:
    """Raises UsageError for a field that is not a finite number above 0."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise UsageError(f"{given(options, name)}: must be above 0{note}")


def check_default(options: object, *names: str, needs: str) -> None:
    """Raises UsageError for an option that has no effect without another."""
    for name in names:
        if getattr(options, name) != getattr(type(options), name):
            raise UsageError(f"{given(options, name)} has no effect without {needs}; give both or neither")


def given(options: object, name: str) -> str:
    """A field as its flag, with its value."""
    return f"--{name.replace('_', '-')} {getattr(options, name)}"
