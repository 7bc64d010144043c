"""The tables of a store: format version, columns, keys, partitions and the order of rows in a file."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from persona.inputs.cells import TIME
from persona.inputs.records import REJECTS

# Version of everything below and of the vector codec, recorded in each store. Raise it when older code would misread
# or damage a store written by newer code. A store without a recorded version has version 1.
#
# 2: data files of behaviors have a key index. Older code would leave it behind when it deletes a data file, even to
#    forget a user. The first writer of the behaviors of a store of version 1 raises it to 2.
FORMAT_VERSION = 2


# A preference pair that a profile shows as an example, and the reasoning that led to the right choice.
DEMONSTRATION = pa.struct([(name, pa.string()) for name in ("request_id", "input", "target", "rejected", "reasoning")])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of one table. `order` sorts the rows of a file; tables without a `key` only grow."""

    schema: pa.Schema
    partition: str
    key: tuple[str, ...]
    order: tuple[str, ...]
    has_key_index: bool = False
    """Whether a key index is written with each data file."""

    @property
    def row_key(self) -> list[str]:
        """The key within a partition."""
        return [name for name in self.key if name != self.partition]

    @property
    def stats_columns(self) -> tuple[str, ...]:
        """Key columns whose range differs between files, so that their min and max let readers skip files."""
        return tuple(name for name in self.key if name in self.order and name != self.partition)

    def schema_read(self, names: Iterable[str]) -> pa.Schema:
        """The schema of columns as they are read: a bucket of vectors may exceed the 2 GiB of `binary`."""
        types = {"vector": pa.large_binary()}
        return pa.schema([(name, types.get(name, self.schema.field(name).type)) for name in names])

    @property
    def partition_type(self) -> pa.DataType:
        """The type of the partition column."""
        return self.schema.field(self.partition).type

    def partition_values(self, texts: Iterable[str]) -> list[Any]:
        """Partition values in the column's own type, from their text in paths and in `DataFile`."""
        return [int(text) if pa.types.is_integer(self.partition_type) else text for text in texts]


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
        has_key_index=True,
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
    # What chat models replied. A key is a hash of model, prompt, settings and user; the prompts are not kept.
    "completions": Layout(
        schema=pa.schema(
            [
                ("key", pa.string()),
                ("user_id", pa.string()),
                ("text", pa.string()),
                ("finish_reason", pa.string()),
                ("n_prompt_tokens", pa.int32()),
                ("n_answer_tokens", pa.int32()),
                ("model", pa.string()),
                ("served_model", pa.string()),
                ("created_at", TIME),
                ("bucket", pa.int32()),
            ]
        ),
        partition="model",
        key=("model", "bucket", "key"),
        order=("model", "bucket", "key"),
    ),
    "judgements": Layout(
        schema=pa.schema(
            [
                ("variant", pa.string()),
                ("request_id", pa.string()),
                ("user_id", pa.string()),
                ("task", pa.string()),
                ("judge", pa.string()),
                ("persona", pa.string()),
                ("score", pa.int32()),
                ("reason", pa.string()),
                ("problem", pa.string()),
                ("fingerprint", pa.string()),
                ("created_at", TIME),
                ("bucket", pa.int32()),
            ]
        ),
        partition="variant",
        key=("variant", "bucket", "request_id", "judge", "persona"),
        order=("variant", "bucket", "request_id", "judge", "persona"),
    ),
    "profiles": Layout(
        schema=pa.schema(
            [
                ("recipe", pa.string()),
                ("bucket", pa.int32()),
                ("user_id", pa.string()),
                ("text", pa.string()),
                ("demonstrations", pa.list_(DEMONSTRATION)),
                ("n_pairs", pa.int32()),
                ("newest_pair_at", TIME),
                ("validation_score", pa.float64()),
                ("n_held_out", pa.int32()),
                ("held_out_score", pa.float64()),
                ("held_out_none", pa.float64()),
                ("n_calls", pa.int32()),
                ("n_unusable", pa.int32()),
                ("model", pa.string()),
                ("fingerprint", pa.string()),
                ("created_at", TIME),
            ]
        ),
        partition="recipe",
        key=("recipe", "bucket", "user_id"),
        order=("recipe", "bucket", "user_id"),
    ),
    "rejects": Layout(schema=REJECTS, partition="job", key=(), order=("job", "source", "row")),
    "sources": Layout(
        schema=pa.schema(
            [
                ("input", pa.string()),
                ("uri", pa.string()),
                ("size_bytes", pa.int64()),
                ("tag", pa.string()),
                ("table_version", pa.int64()),
                ("read_as", pa.string()),
                ("rows", pa.int64()),
                ("rejects", pa.int64()),
                ("run", pa.string()),
                ("read_at", TIME),
                ("epoch", pa.string()),
                ("exact_version", pa.int64()),
            ]
        ),
        partition="input",
        key=("input", "uri"),
        order=("input", "uri"),
    ),
    "plugs": Layout(
        schema=pa.schema(
            [
                ("version", pa.int32()),
                ("stage", pa.string()),
                ("uri", pa.string()),
                ("fingerprint", pa.string()),
                ("run", pa.string()),
                ("loss", pa.float64()),
                ("saved_against_other", pa.float64()),
                ("saved_against_live", pa.float64()),
                ("metrics", pa.string()),
                ("evaluation", pa.string()),
                ("reason", pa.string()),
                ("decided_at", TIME),
                ("live_since", TIME),
            ]
        ),
        partition="stage",
        key=("stage", "version"),
        order=("stage", "version"),
    ),
}
