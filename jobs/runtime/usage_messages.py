"""Turns what the command line parser found wrong into one line that says what is right."""

import difflib
from collections.abc import Iterable, Sequence
from enum import EnumType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from cyclopts import Argument, CycloptsError, Token

_SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off", "0", "1")
_RULES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "none",
}


def explain(error: "CycloptsError", keys: Sequence[str]) -> str:
    """The message for a parser's error; `keys` are the fields of the config."""
    from cyclopts import exceptions

    if isinstance(error, exceptions.UnknownOptionError) and error.token.source != "cli":
        key = (error.token.keyword or error.token.value).split("]")[0].lstrip("[")
        return f"--config {error.token.source}: {key}: a mapping does not fit here; see --help"
    if unknown := _unknown_flag(error, flags := ["--config", "--verbose", "--help", *map(flag_of, keys)]):
        return f"unknown flag {unknown}{did_you_mean(unknown, flags)}"
    if isinstance(error, exceptions.MissingArgumentError) and error.argument is not None:
        if error.keyword is not None:
            return f"{error.argument.name} needs a value: {_rule(error.argument.hint)}"
        where = "give it as a flag, or as a key of the --config file"
        choices = f"; it must be {_rule(error.argument.hint)}" if get_origin(error.argument.hint) is Literal else ""
        return f"{error.argument.name} is missing: {where}{choices}{_flagless(error)}"
    if isinstance(error, exceptions.CoercionError) and error.argument is not None and error.token is not None:
        return misfit(error.token, error.argument)
    if isinstance(error, exceptions.RepeatArgumentError):
        return f"{error.token.keyword} is given twice"
    if isinstance(error, exceptions.UnusedCliTokensError) and error.unused_tokens:
        value = error.unused_tokens[0]
        is_switch_value = value.lower() in _SWITCH_VALUES
        switch = "; a switch takes no value: write --flag or --no-flag" if is_switch_value else ""
        return f"unexpected {value!r}{switch}"
    error.verbose = False
    return str(error)


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str = "; see --help") -> str:
    """`; did you mean X?`, or `otherwise` when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else otherwise


def flag_of(key: str) -> str:
    """The flag of a field."""
    return f"--{key.replace('_', '-')}"


def misfit(token: "Token", argument: "Argument") -> str:
    """A value that does not fit: the flag, or the file and its key, the value, and the rule."""
    place = argument.name
    if token.source not in ("", "cli"):
        place = f"--config {token.source}: {place.removeprefix('--').replace('-', '_')}"
    value = "null" if token.implicit_value is None else token.value
    return f"{place} {value!r}: must be {_rule(argument.hint)}"


def _unknown_flag(error: "CycloptsError", flags: Sequence[str]) -> str | None:
    """The first flag that does not exist: often the reason why another one is missing."""
    from cyclopts import exceptions

    if isinstance(error, exceptions.UnknownOptionError):
        return error.token.keyword or error.token.value
    given = [one.split("=")[0].replace("_", "-") for one in error.unused_tokens or () if one.startswith("--")]
    return next((one for one in given if one not in flags and one.replace("--no-", "--", 1) not in flags), None)


def _flagless(error: "CycloptsError") -> str:
    """Names the first value without a flag: often the one that is missing."""
    value = next((one for one in error.unused_tokens or () if not one.startswith("-")), None)
    return f"; {value!r} has no flag before it" if value is not None else ""


def _rule(hint: Any) -> str:
    """What a field of this type accepts, in words."""
    if get_origin(hint) is Annotated:
        return _rule(get_args(hint)[0])
    if get_origin(hint) is Literal or isinstance(hint, EnumType):
        *most, last = map(str, hint if isinstance(hint, EnumType) else get_args(hint))
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(hint) in (list, tuple):
        return f"a list, each {_rule(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(_rule(one) for one in get_args(hint))
    return _RULES.get(hint, str(hint))
