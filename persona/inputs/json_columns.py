"""Convert JSON values to Arrow columns and back; values without a common type stay JSON text."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa

MAX_CELLS = 2**22  # of a table; most are null if every object has different keys
MAX_KEYS = 2**14  # of an object; Arrow takes about a kilobyte for each column or field
_MAX_DEPTH = 32  # of nested lists and objects that become Arrow types; hundreds of levels take Arrow seconds


def json_array(values: Sequence[Any]) -> pa.Array:
    """JSON values as an array of their common type, or of type `arrow.json` if they have none."""
    if _have_common_type(values):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, OverflowError):  # integers above int64 together with negative ones
            pass
    return pa.array([None if v is None else _dumps(v) for v in values], pa.json_())


def decoded(column: pa.Array) -> list[Any]:
    """The Python values of an `arrow.json` column; a text that is not JSON becomes a value of kind "broken JSON"."""
    return [None if v is None else _loads(v) for v in column.storage.to_pylist()]


def is_json(kind: pa.DataType) -> bool:
    """Whether each value of the type is a separate JSON text."""
    return isinstance(kind, pa.JsonType)


def kind_of(value: Any) -> str:
    """The kind of a JSON value in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names[_BrokenJson] = "broken JSON"
    return names.get(type(value), "a number")


class _BrokenJson:
    """Stands for a text that is not JSON; no reader of cells accepts it."""


def _have_common_type(values: Sequence[Any]) -> bool:
    """Whether the values have the same type at every level. Arrow itself would convert 1 and true next to 0.5 to 1.0.

    False for very deep values, and for objects that have too many keys or hardly any in common.
    """
    groups = [(0, values)]
    while groups:
        depth, group = groups.pop()
        kinds = {type(v) for v in group} - {type(None)}
        if len(kinds) > 1 or depth > _MAX_DEPTH:
            return False
        if kinds == {list}:
            groups.append((depth + 1, [item for v in group if v is not None for item in v]))
        if kinds == {dict}:
            fields = defaultdict(list)
            for name, value in (pair for v in group if v is not None for pair in v.items()):
                fields[name].append(value)
            if len(fields) > MAX_KEYS or len(fields) * len(group) > max(MAX_CELLS, 16 * sum(map(len, fields.values()))):
                return False
            groups += [(depth + 1, found) for found in fields.values()]
    return True


def _dumps(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # too deep; the empty text is broken JSON, so the row is rejected if it is needed
        return ""


def _loads(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return _BrokenJson()
