"""Bad files in one folder, and unusually large good ones: good rows are kept, each bad file or row is one reject."""

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from persona.inputs import histories
from persona.inputs.histories import Columns
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits

MB = 2**20
LONG = "ἀ" * (10 * MB // 3)  # 3 bytes each


def line(text: Any = "t", user: Any = "u", **more: Any) -> bytes:
    return json.dumps({"user_id": user, "text": text, **more}, ensure_ascii=False).encode() + b"\n"


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def plain(n: int) -> pa.Table:
    return pa.table({"user_id": [f"p{i}" for i in range(n)], "text": [f"text {i}" for i in range(n)]})


def damaged_group() -> bytes:
    """Three row groups of a hundred rows; the second one is overwritten."""
    content = bytearray(parquet(plain(300), row_group_size=100, write_page_checksum=True))
    column = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(1).column(1)
    content[column.data_page_offset + 40 : column.data_page_offset + 60] = bytes(20)
    return bytes(content)


def duplicate_column() -> bytes:
    strings = pa.array(["a", "b"])
    return parquet(pa.Table.from_arrays([strings, strings, strings], names=["user_id", "text", "text"]))


def broken_json() -> bytes:
    """An `arrow.json` column in which one of two texts is not JSON."""
    strings = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"fine"', "fine"]))
    return parquet(pa.table({"user_id": ["u", "u"], "text": strings}))


WHOLE = parquet(plain(300), row_group_size=100)
PACKED = gzip.compress(b"".join(map(line, "abc")))
TIMES = [0, "2024-02-29", 1.5, None, 10**12, -(10**12), "2024-02-30", 1e300, True, [0]]
DAYS = pa.array([0, 2**31 - 1, -(2**31), None], pa.date32())
USERS = [
    b'{"user_id": "u", "behaviors": [{"text": "a"}, {"text": 5}, 7, null, {"text": "b", "timestamp": "soon"}]}\n',
    b'{"user_id": null, "behaviors": [{"text": "a"}, {"text": "b"}]}\n',
    b'{"user_id": "v", "behaviors": {"text": "a"}}\n{"user_id": "w", "behaviors": []}\n',
    b'{"user_id": "x", "behaviors": [{"text": "c"}, {"text": "d"}]}\n{"user_id": "y", "text": "e"}\n',
]
FILES: dict[str, tuple[bytes, int, int]] = {  # content, good rows, rejects
    "0-good.parquet": (WHOLE, 300, 0),
    "types.jsonl": (b"".join(map(line, ["t", 5, 1.5, True, None, ["t"], {"t": 1}, "", " \u3000"])), 1, 8),
    "users.jsonl": (b"".join(line("t", user) for user in ["u", 7, 2**63, 1.5, True, None, [], {}, "\t"]), 3, 6),
    "times.jsonl": (b"".join(line(timestamp=time) for time in TIMES), 4, 6),
    "days.parquet": (parquet(pa.table({"user_id": list("abcd"), "text": list("abcd"), "timestamp": DAYS})), 2, 2),
    "long.jsonl": (line(LONG) + line(LONG[:-1]) + line(), 3, 0),
    "long.jsonl.gz": (gzip.compress(line(LONG) + line(), 1), 2, 0),
    "scripts.jsonl": (
        b"".join(map(line, ["\u200b", "\u202eevil", "مرحبا", "a\u200db", "\ufeff", "\x00", "👩‍👩‍👧"])),
        7,
        0,
    ),
    "ids.jsonl": (b"".join(line("t", user) for user in ["a/b", "it's", '"', "a b", "👍", "..", "%2F", "\\"]), 8, 0),
    "keys.jsonl": (b'{"text": "t", "user_id": 5, "text": 5, "user_id": "u", "text": "last"}\n' + line("t") * 3, 4, 0),
    "layouts.jsonl": (b"".join(USERS), 4, 7),
    "deep.jsonl": (
        line(note=0) + line()[:-2] + b', "note": ' + b"[" * 500 + b"]" * 500 + b"}\n" + line(note="x"),
        3,
        0,
    ),
    "deeper.jsonl": (line() + b"[" * 9999 + b"]" * 9999 + b"\n" + line(), 2, 1),
    "keyed.jsonl": (b"".join(line(**{f"key {i} {j}": j for j in range(30)}) for i in range(600)), 600, 0),
    "numbers.jsonl": (line() + b'{"user_id": "u", "text": NaN}\n{"user_id": 1e999, "text": "t"}\n' + line(), 2, 2),
    "surrogate.jsonl": (line() + b'{"user_id": "u", "text": "\\ud800"}\n' + line(), 2, 1),
    "utf8.jsonl": (line() + b'{"user_id": "u", "text": "\xff"}\n' + line(), 2, 1),
    "utf16.jsonl": (line().decode().encode("utf-16"), 0, 2),
    "mark.jsonl": (b"\xef\xbb\xbf" + line() + b"\r\n \t\n" + line()[:-1] + b"\r\n", 2, 0),
    "cut.jsonl": (line() * 2 + line()[:-5], 2, 1),
    "lists.json": (b'[{"user_id": "u", "text": "t"}]\n"text"\n5\nnull\n', 0, 4),
    "indented.json": (json.dumps({"user_id": "u", "text": "t"}, indent=1).encode(), 0, 4),
    "bytes.parquet": (parquet(pa.table({"user_id": [b"u", b"\xff", b"u"], "text": [b"t", b"t", b"\xc3("]})), 1, 2),
    "wrong.parquet": (parquet(pa.table({"user_id": [1.5, None], "text": ["t", "t"]})), 0, 2),
    "other.parquet": (parquet(pa.table({"author": ["a"], "body": ["b"]})), 0, 1),
    "no-columns.parquet": (parquet(pa.table({})), 0, 0),
    "no-rows.parquet": (parquet(plain(0)), 0, 0),
    "no-json.parquet": (broken_json(), 1, 1),
    "doubled.parquet": (duplicate_column(), 0, 1),
    "damaged.parquet": (damaged_group(), 200, 1),
    "cut.parquet": (WHOLE[: len(WHOLE) // 2], 0, 1),
    "cut-by-one.parquet": (WHOLE[:-1], 0, 1),
    "text.parquet": (line(), 0, 1),
    "empty.parquet": (b"", 0, 1),
    "empty.jsonl": (b"", 0, 0),
    "no-gzip.jsonl.gz": (line() * 3, 0, 1),
    "empty.jsonl.gz": (b"", 0, 1),
    "members.jsonl.gz": (PACKED + PACKED, 6, 0),
    "rest.jsonl.gz": (PACKED + b"rest", 3, 1),
    "cut.jsonl.gz": (gzip.compress(line("a")) + gzip.compress(line("b"))[:-4], 2, 1),
    "zip.jsonl": (PACKED, 0, 1 + PACKED.count(b"\n")),
    "part=it's 5% {of} #1?/👍 \n.jsonl": (line(), 1, 0),
    "like.parquet/part-0.jsonl": (line(), 1, 0),
    "_SUCCESS": (b"", 0, 0),
    "_temporary/0.jsonl": (line(), 0, 0),
    ".hidden.jsonl": (line(), 0, 0),
    "readme.txt": (line(), 0, 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nasty")
    for name, (content, _, _) in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def each(uri: Path, visit: Callable[[pa.Table, pa.Table], None], **options: Any) -> None:
    """Call `visit` with the good rows (with their source) and the rejects, a table at a time."""
    exclude = ["readme.txt", ".*.jsonl"]
    splits = plan_splits(str(uri), flag="--in", exclude=exclude, split_bytes=options.pop("split_bytes", 2**26))
    histories.check_columns(splits, Columns())
    for split in splits:
        for records in read_split(split, **options):
            good, rejects = histories.validate(records, Columns(), 4)
            visit(good.append_column("source", pa.repeat(split.uri, good.num_rows)), rejects)


@pytest.mark.parametrize("options", [{}, {"split_bytes": 200_000, "max_rows": 2}], ids=["whole", "cut"])
def test_one_folder_of_bad_files(folder: Path, options: dict[str, int]) -> None:
    good: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    texts: dict[str, list[str]] = {}

    def visit(rows: pa.Table, rejects: pa.Table) -> None:
        good.update(rows["source"].to_pylist())
        bad.update(rejects["source"].to_pylist())
        for row in rows.select(["source", "text"]).to_pylist():
            texts.setdefault(row["source"], []).append(row["text"])
        assert not pc.any(pc.equal(pc.binary_length(rejects["reason"]), 0)).as_py()

    each(folder, visit, **options)
    found = {name: (good[str(folder / name)], bad[str(folder / name)]) for name in FILES}
    assert found == {name: (n_good, n_bad) for name, (_, n_good, n_bad) in FILES.items()}
    assert set(good) | set(bad) <= {str(folder / name) for name in FILES}
    assert [text == LONG for text in texts[str(folder / "long.jsonl")]] == [True, False, False]
    assert texts[str(folder / "keys.jsonl")][0] == "last"
    assert texts[str(folder / "scripts.jsonl")] == [
        json.loads(x)["text"] for x in FILES["scripts.jsonl"][0].splitlines()
    ]


class Peak:
    """Collects the ids of the rows, and the peak of Arrow's allocated memory."""

    def __init__(self) -> None:
        self.before = pa.total_allocated_bytes()
        self.bytes = 0
        self.names: list[np.ndarray] = []

    def __call__(self, rows: pa.Table, rejects: pa.Table) -> None:
        assert rejects.num_rows == 0
        self.bytes = max(self.bytes, pa.total_allocated_bytes() - self.before)
        self.names.append(rows["behavior_id"].cast(pa.int64()).to_numpy())


def test_a_million_rows_of_one_user_are_read_in_small_batches(tmp_path: Path) -> None:
    n = 10**6
    ids = pa.array(range(n))
    strings = pc.binary_join_element_wise(pa.scalar("like it " * 20), ids.cast(pa.string()), "")
    table = pa.table({"user_id": pa.repeat("u", n), "behavior_id": ids, "text": strings})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=n)
    size = table.nbytes
    del table, strings, ids
    peak = Peak()
    each(tmp_path, peak)
    assert np.array_equal(np.concatenate(peak.names), np.arange(n))
    assert peak.bytes < size / 4


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_only_a_few_long_texts_are_in_memory_at_a_time(tmp_path: Path, kind: str) -> None:
    n = 12
    if kind == "parquet":
        strings = pa.array([LONG] * n)
        pq.write_table(
            pa.table({"user_id": ["u"] * n, "behavior_id": range(n), "text": strings}),
            tmp_path / "in.parquet",
            use_dictionary=False,
            write_batch_size=1,  # one text per page
            write_statistics=False,
        )
        del strings
    else:
        content = b"".join(line(LONG, behavior_id=i) for i in range(n))
        (tmp_path / f"in.{kind}").write_bytes(gzip.compress(content, 1) if kind == "jsonl.gz" else content)
    peak = Peak()
    each(tmp_path, peak)
    assert np.concatenate(peak.names).tolist() == list(range(n))
    assert peak.bytes < n * 10 * MB
