"""What the tables of a store look like: their columns, their keys, and how their rows lie in files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from persona.inputs.cells import TIME
from persona.inputs.records import REJECTS


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A Parquet file of a table: its path, its partition's value, its size, and between which keys its rows lie."""

    path: str
    partition: str
    n_rows: int
    size_bytes: int
    span: Mapping[str, tuple[Any, Any]]

    def to_json(self) -> str:
        """As text, to travel between processes."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "DataFile":
        """From `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "span": {name: tuple(ends) for name, ends in fields["span"].items()}})

    def may_share_rows(self, other: "DataFile") -> bool:
        """Whether both may hold a row of the same key, as far as their spans tell."""
        both = self.span.keys() & other.span.keys()
        apart = any(self.span[n][1] < other.span[n][0] or other.span[n][1] < self.span[n][0] for n in both)
        return self.partition == other.partition and not apart


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a table is laid out: its key, the order of rows in a file, and of which columns the log keeps the span."""

    schema: pa.Schema
    partition: str
    key: tuple[str, ...]
    order: tuple[str, ...]

    @property
    def spans(self) -> tuple[str, ...]:
        """The columns of the key that tell files of one partition apart, by which readers skip what they can."""
        return tuple(name for name in self.key if name in self.order and name != self.partition)


LAYOUTS = {
    "behaviors": Layout(
        schema=pa.schema(
            [
                ("bucket", pa.int32()),
                ("user_id", pa.string()),
                ("behavior_id", pa.string()),
                ("timestamp", TIME),
                ("text_hash", pa.string()),
                ("vector", pa.binary()),
                ("embedded_at", TIME),
            ]
        ),
        partition="bucket",
        key=("bucket", "user_id", "behavior_id"),
        order=("bucket", "user_id", "timestamp"),
    ),
    "personas": Layout(
        schema=pa.schema(
            [
                ("bucket", pa.int32()),
                ("user_id", pa.string()),
                ("plug", pa.string()),
                ("n_behaviors", pa.int32()),
                ("persona", pa.list_(pa.float32())),
                ("updated_at", TIME),
            ]
        ),
        partition="bucket",
        key=("bucket", "user_id", "plug"),
        order=("bucket", "user_id"),
    ),
    "generations": Layout(
        schema=pa.schema(
            [
                ("request_id", pa.string()),
                ("user_id", pa.string()),
                ("output", pa.string()),
                ("variant", pa.string()),
                ("plug", pa.string()),
                ("llm", pa.string()),
                ("n_behaviors", pa.int32()),
                ("n_tokens", pa.int32()),
                ("finish_reason", pa.string()),
                ("fingerprint", pa.string()),
                ("created_at", TIME),
                ("bucket", pa.int32()),
            ]
        ),
        partition="variant",
        key=("variant", "bucket", "request_id"),
        order=("variant", "bucket", "request_id"),
    ),
    "rejects": Layout(schema=REJECTS, partition="job", key=(), order=("job", "source", "row")),
}
