"""Random input: whatever a file contains and wherever it is cut, good rows are read once and bad ones get a reason.

Each cell is generated together with its expected value, so no expectation depends on the code under test.
"""

import hashlib
import itertools
import json
import re
import tempfile
import zlib
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from persona.errors import InputError
from persona.inputs import histories, requests
from persona.inputs.histories import Columns
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits
from persona.store.identity import Identity
from persona.store.store import Store
from tests.nasty import BAD, BEHAVIORS, NASTY, REQUESTS, TEXTS, USERS, Case, a_behavior, a_user, columns, micros

SOME = settings(max_examples=60)
CUTS = st.fixed_dictionaries({"split_bytes": st.integers(1, 2000), "max_rows": st.integers(1, 10)})


def read(uri: Path, kind: str, split_bytes: int = 2**26, max_rows: int = 4096) -> tuple[list[Any], list[Any]]:
    """All good rows as tuples, and the row and the words of the reason of all rejects."""
    good, bad = [], []
    splits = plan_splits(str(uri), flag="--in", split_bytes=split_bytes)
    for split in splits:
        for records in read_split(split, max_rows=max_rows):
            if kind == "requests":
                table, rejects = requests.validate(records, 4, needs_target=False)
            else:
                table, rejects = histories.validate(records, Columns(), 4)
            names = [name for name in table.column_names if name not in ("bucket", "text_hash")]
            good += [
                tuple(micros(v) if isinstance(v, datetime) else v for v in row.values())
                for row in table.select(names).to_pylist()
            ]
            bad += [(row["row"], set(re.findall(r"\w+", row["reason"]))) for row in rejects.to_pylist()]
            assert table["bucket"].to_pylist() == [zlib.crc32(u.encode()) % 4 for u in table["user_id"].to_pylist()]
    with suppress(InputError):  # the only error allowed
        histories.check_columns(splits, Columns())
    return good, bad


def check(found: tuple[list[Any], list[Any]], cases: list[Case], offsets: list[int]) -> None:
    """Each good row is read once, in input order; each bad one is a reject with its row and the name of a column."""
    good, bad = found
    assert good == [row for case in cases for row in case.good]
    expected = [(offset, names) for case, offset in zip(cases, offsets, strict=True) for names in case.bad]
    assert sorted(row for row, _ in bad) == [offset for offset, _ in expected]
    for offset in {offset for offset, _ in expected}:
        allowed = set().union(*(names for at, names in expected if at == offset))
        assert all(words & allowed for row, words in bad if row == offset), (bad, expected)


@pytest.mark.parametrize(("kind", "cases"), [("behaviors", BEHAVIORS), ("users", USERS), ("requests", REQUESTS)])
def test_lines_with_any_values(kind: str, cases: st.SearchStrategy) -> None:
    ends = st.lists(st.sampled_from([b"\n", b"\r\n", b"\n \r\n\n"]), min_size=8, max_size=8)

    @SOME
    @given(cases, ends, st.sampled_from([b"", b"\xef\xbb\xbf"]), st.booleans(), CUTS)
    def check_lines(cases: list[Case], ends: list[bytes], mark: bytes, ascii_only: bool, cuts: dict[str, int]) -> None:
        content, offsets = mark, []
        for case, end in zip(cases, ends, strict=False):
            offsets.append(0 if content == mark else len(content))
            content += json.dumps(case.raw, ensure_ascii=ascii_only).encode() + end
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in.jsonl").write_bytes(
                content.removesuffix(ends[len(cases) - 1]) if ascii_only else content
            )
            check(read(Path(folder), kind), cases, offsets)
            check(read(Path(folder), kind, **cuts), cases, offsets)

    check_lines()


DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
VALUES = [None, "x", 7, -1, 2**63, 1.5, 0.0, True, [], [1], {}, {"text": "x"}, DEEP]
GOOD = {
    "user_id": ["x", 7, -1, 2**63],
    "behavior_id": [None, "x", 7, -1, 2**63],
    "text": ["x"],
    "timestamp": [None, 7, -1, 1.5, 0.0],
    "note": VALUES,
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("field", list(GOOD))
def test_the_other_rows_do_not_affect_whether_a_row_is_good(field: str, nested: bool, tmp_path: Path) -> None:
    plain = {"user_id": "u", "behavior_id": "b", "text": "t"}
    good_values = {repr(value) for value in GOOD[field]}  # repr, because 1 == True
    # A list item too deep to be kept as JSON spoils the whole list.
    values = [value for value in VALUES if not (nested and value is DEEP)]
    for pair in itertools.permutations(values, 2):
        records = [plain | {field: value} for value in pair]
        if nested:
            records = [{"user_id": record.pop("user_id"), "behaviors": [record]} for record in records]
        lines = [json.dumps(record).encode() for record in records]
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
        good, bad = read(tmp_path, "behaviors")
        is_good = [repr(value) in good_values for value in pair]
        assert len(good) == sum(is_good), pair
        assert [row for row, _ in bad] == [
            at for at, ok in zip([0, len(lines[0]) + 1], is_good, strict=True) if not ok
        ], pair
        assert all(field in words for _, words in bad), (pair, bad)


def test_users_with_lists_keep_their_behaviors_next_to_a_user_with_a_text(tmp_path: Path) -> None:
    lines = [b'{"user_id": "u%d", "behaviors": [{"text": "a"}, {"text": "b"}]}' % n for n in range(3)]
    lines.insert(1, b'{"user_id": "v", "text": "c"}')
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    good, bad = read(tmp_path, "behaviors")
    assert [(user, text) for user, _, text, _ in good] == [
        *[("u0", "a"), ("u0", "b"), ("v", "c")],
        *[("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b")],
    ]
    assert bad == []


ITEM_DEFAULTS = {"behavior_id": None, "text": BAD, "timestamp": None}


@SOME
@given(st.data(), st.integers(1, 12), st.booleans(), st.integers(1, 12), CUTS)
def test_parquet_columns_of_any_type(
    data: st.DataObject, n: int, nested: bool, group: int, cuts: dict[str, int]
) -> None:
    if nested:
        users, owners = data.draw(columns(n, {"user_id": BAD}))
        lengths = data.draw(st.lists(st.integers(0, 3) | st.none(), min_size=n, max_size=n))
        arrays, items = data.draw(columns(sum(length or 0 for length in lengths), ITEM_DEFAULTS))
        offsets = [0, *itertools.accumulate(length or 0 for length in lengths)]
        mask = pa.array([length is None for length in lengths])
        lists = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(arrays.values(), arrays), mask=mask
        )
        table = pa.table({**users, "behaviors": lists})
        at = zip(owners, offsets, offsets[1:], strict=False)
        cases = [a_user(owner["user_id"], items[first:end]) for owner, first, end in at]
    else:
        arrays, rows = data.draw(columns(n, {"user_id": BAD, **ITEM_DEFAULTS}))
        table, cases = pa.table(arrays), [a_behavior(row) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder) / "in.parquet", row_group_size=group)
        check(read(Path(folder), "users"), cases, list(range(n)))
        check(read(Path(folder), "users", **cuts), cases, list(range(n)))


LINES = st.lists(
    st.builds(lambda text: json.dumps({"user_id": "u", "text": text}, ensure_ascii=False).encode(), TEXTS),
    min_size=1,
    max_size=8,
)


def texts(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["text"] for line in lines]


@SOME
@given(LINES, st.data())
def test_text_cut_at_any_byte_keeps_the_lines_before_the_cut(lines: list[bytes], data: st.DataObject) -> None:
    content = b"\n".join(lines) + b"\n"
    cut = data.draw(st.integers(1, len(content)))
    ends = list(itertools.accumulate(len(line) + 1 for line in lines))
    whole = [line for line, end in zip(lines, ends, strict=True) if end - 1 <= cut]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.jsonl").write_bytes(content[:cut])
        good, bad = read(Path(folder), "behaviors", split_bytes=data.draw(st.integers(1, 100)))
    assert [text for _, _, text, _ in good] == texts(whole)
    begun = ends[len(whole) - 1] if whole else 0
    assert [row for row, _ in bad] == ([begun] if cut > begun else [])


@SOME
@given(LINES, st.booleans(), st.data())
def test_gzip_cut_at_any_byte_keeps_the_lines_before_the_cut(
    lines: list[bytes], members: bool, data: st.DataObject
) -> None:
    """The compressor is flushed, or a member ends, after each line, so the end of each line in the file is known."""
    content, ends = b"", []
    packer = zlib.compressobj(wbits=31)
    for line in lines:
        content += packer.compress(line + b"\n") + packer.flush(zlib.Z_FINISH if members else zlib.Z_FULL_FLUSH)
        packer = zlib.compressobj(wbits=31) if members else packer
        ends.append(len(content))
    content += b"" if members else packer.flush()
    cut = data.draw(st.integers(0, len(content)))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jsonl.gz").write_bytes(content[:cut])
        (Path(folder) / "b.jsonl").write_bytes(b'{"user_id": "u", "text": "the next file"}')
        good, bad = read(Path(folder), "behaviors")
    *found, last = [text for _, _, text, _ in good]
    assert last == "the next file" and found == texts(lines)[: len(found)]
    assert len(found) >= sum(end <= cut for end in ends)
    assert [row for row, _ in bad] == ([] if cut == len(content) or (members and cut in ends) else [-1])


@SOME
@given(st.lists(TEXTS, min_size=1, max_size=40), st.integers(1, 40), st.data())
def test_parquet_cut_at_any_byte_is_one_reject(words: list[str], group: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.parquet"
        pq.write_table(pa.table({"user_id": words, "text": words}), file, row_group_size=group)
        content = file.read_bytes()
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        (Path(folder) / "b.jsonl").write_bytes(b'{"user_id": "u", "text": "the next file"}')
        good, bad = read(Path(folder), "behaviors", split_bytes=data.draw(st.integers(50, 5000)))
    assert [text for _, _, text, _ in good] == ["the next file"]
    assert [(row, {"file", "read"} <= words) for row, words in bad] == [(-1, True)]


@SOME
@given(LINES, st.sampled_from([b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xf5", b"\x00\xfe"]), st.data())
def test_invalid_utf8_rejects_its_line_only(lines: list[bytes], junk: bytes, data: st.DataObject) -> None:
    hit = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[hit])))
    broken = [*lines[:hit], lines[hit][:at] + junk + lines[hit][at:], *lines[hit + 1 :]]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.jsonl").write_bytes(b"\r\n".join(broken))
        good, bad = read(Path(folder), "behaviors", split_bytes=data.draw(st.integers(1, 100)))
    assert [text for _, _, text, _ in good] == texts(lines[:hit] + lines[hit + 1 :])
    assert [(row, "line" in words) for row, words in bad] == [(sum(len(line) + 2 for line in lines[:hit]), True)]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    facts = {"encoder": "e", "revision": "r", "fingerprint": "f", "pooling": "mean", "text_rule": "t"}
    return Store.create(str(tmp_path_factory.mktemp("store") / "s"), Identity(width=2, max_tokens=2, **facts), 1)


KEYS = st.tuples(st.sampled_from(NASTY[:4]), st.sampled_from([*NASTY[4:7], 7]))
DUPLICATES = st.lists(st.tuples(KEYS, st.sampled_from("xyz"), st.sampled_from([None, 0, 5])), min_size=1, max_size=12)


@settings(SOME, max_examples=25)
@given(DUPLICATES)
def test_the_latest_row_of_a_duplicate_key_wins(empty_store: Store, rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = ("user_id", "behavior_id", "text", "timestamp")
        lines = [json.dumps(dict(zip(names, (*key, text, time), strict=True))) for key, text, time in rows]
        (Path(folder) / "in.jsonl").write_text("\n".join(lines))
        (records,) = read_split(plan_splits(folder, flag="--in")[0])
    behaviors, rejects = histories.validate(records, Columns(), 1)
    to_encode, counts = empty_store.missing(0, behaviors)
    latest: dict[Any, Any] = {}
    for key, text, time in rows:
        rank = (-1 if time is None else time, hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
        latest[key] = max(latest.get(key, (rank, text)), (rank, text))
    found = {(row["user_id"], row["behavior_id"]): row["text"] for row in to_encode.to_pylist()}
    assert found == {(user, str(name)): text for (user, name), (_, text) in latest.items()}
    assert (counts["new"], counts["duplicates"], rejects.num_rows) == (len(latest), len(rows) - len(latest), 0)
