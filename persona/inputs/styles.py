"""Styles of writing, and requests that ask for them: each request crossed with each style."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.errors import InputError
from persona.inputs import cells
from persona.inputs.reader import read_split
from persona.inputs.records import column
from persona.inputs.requests import SCHEMA
from persona.inputs.splits import plan_splits

Place = Literal["before", "after"]
MAX_STYLES = 1000
STYLED = pa.schema([*(field for field in SCHEMA if field.name != "bucket"), pa.field("style", pa.string())])
_FIELDS = ("id", "instruction")


@dataclass(frozen=True)
class Style:
    """A way to write, like `short` with the instruction "Use at most six words."."""

    id: str
    instruction: str


def read_styles(uri: str, *, flag: str) -> list[Style]:
    """The styles of a small file, or of some, with the columns `id` and `instruction`, in their order.

    Raises InputError, naming `flag`, if one is broken or has no id or instruction, an id is there twice or contains a
    slash, or there are more than `MAX_STYLES`.
    """
    styles: list[Style] = []
    for split in plan_splits(uri, flag=flag):
        for records in read_split(split, columns=_FIELDS):
            if records.rejects.num_rows:
                raise InputError(f"{flag}: {split.uri} has a bad row: {records.rejects['reason'][0]}")
            styles += _styles(records.table, f"{flag}: {split.uri}")
            if len(styles) > MAX_STYLES:
                raise InputError(f"{flag}: {uri} has more than {MAX_STYLES:,} styles; give the few to cross with")
    if not styles:
        raise InputError(f"{flag}: {uri} has no style; give rows with {' and '.join(_FIELDS)}")
    name, n = Counter(style.id for style in styles).most_common(1)[0]
    if n > 1:
        raise InputError(f"{flag}: {uri} has the id {name!r} {n} times; give each style its own")
    return styles


def _styles(table: pa.Table, source: str) -> list[Style]:
    ids, why_id = cells.ids(column(table, "id"), "id")
    texts, why_text = cells.texts(column(table, "instruction"), "instruction")
    for why in pc.coalesce(why_id, why_text).drop_null().to_pylist():
        raise InputError(f"{source}: a style cannot be used ({why}); each needs {' and '.join(_FIELDS)}")
    styles = [Style(one, text.strip()) for one, text in zip(ids.to_pylist(), texts.to_pylist(), strict=True)]
    for style in styles:
        if "/" in style.id:
            raise InputError(f"{source}: the id {style.id!r} has a slash, which separates request and style; remove it")
    return styles


def with_styles(requests: pa.Table, styles: Sequence[Style], *, place: Place) -> pa.Table:
    """Each request in each style (`STYLED`): the id is `request_id/style`, and the instruction is part of the input.

    The query stays the plain one, so a style does not change how behaviors are weighted.
    """
    n_styles = len(styles)
    repeated = requests.take(pa.array(np.repeat(np.arange(requests.num_rows), n_styles)))

    def tiled(texts: Sequence[str], kind: pa.DataType) -> pa.Array:
        return pa.array(list(texts) * requests.num_rows, kind)

    ids = tiled([style.id for style in styles], pa.string())
    texts = [tiled([style.instruction for style in styles], pa.large_string()), repeated["input"]]
    columns = {name: repeated[name] for name in STYLED.names if name != "style"}
    columns["request_id"] = pc.binary_join_element_wise(repeated["request_id"], ids, "/")
    parts = texts if place == "before" else texts[::-1]
    columns["input"] = pc.binary_join_element_wise(*parts, pa.scalar("\n", pa.large_string()))
    return pa.table({**columns, "style": ids}).cast(STYLED)
