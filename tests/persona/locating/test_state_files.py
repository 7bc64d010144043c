"""Parts on disk and on S3: what is complete, what a sample has, and that nothing counts twice."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona import storage
from persona.locating import comparison, state_files
from persona.locating.comparison import Comparison

N_STATES, WIDTH = 3, 4


def state(group: str, row: int, layer: int) -> list[float]:
    return [float(row), float(layer), float(len(group)), 0.5]


def write(folder: str, rows: list[tuple[str, int, int | None]]) -> str:
    table = state_files.rows_of(
        [group for group, _, _ in rows], [f"r{row}" for _, row, _ in rows], [label for _, _, label in rows],
        [f"u{row // 2}" for _, row, _ in rows],
    )  # fmt: skip
    hidden = np.array([[state(group, row, layer) for layer in range(N_STATES)] for group, row, _ in rows], np.float32)
    return state_files.write_part(folder, table, hidden).name


def names(folder: str) -> list[str]:
    return [part.name for part, _ in state_files.parts(folder)]


def test_a_sample_has_the_rows_of_its_group_and_label_with_their_states(root):
    folder = storage.join(root, "states")
    write(folder, [("aa", row, row % 2) for row in range(10)] + [("b", row, 1) for row in range(5)])
    write(folder, [("b", row, 0) for row in range(5, 9)])
    [(part, _), _] = state_files.parts(folder)
    assert (part.n_states, part.width) == (N_STATES, WIDTH)
    for layer in range(N_STATES):
        rows, hidden = state_files.sample(folder, names(folder), layer=layer, group="aa", label=1, most=100)
        found = {row: values.tolist() for row, values in zip(rows["row_id"].to_pylist(), hidden, strict=True)}
        assert found == {f"r{row}": state("aa", row, layer) for row in (1, 3, 5, 7, 9)}
    rows, _ = state_files.sample(folder, names(folder), layer=0, group="b", label=None, most=100)
    assert sorted(rows["row_id"].to_pylist()) == [f"r{row}" for row in range(9)]
    rows, hidden = state_files.sample(folder, names(folder), layer=0, group="none", label=None, most=100)
    assert (rows.num_rows, len(hidden)) == (0, 0)


def test_a_part_without_its_index_does_not_exist(tmp_path):
    folder = str(tmp_path / "states")
    whole, cut_off = write(folder, [("a", 1, 1)]), write(folder, [("a", 2, 1)])
    storage.delete(storage.join(folder, "index", cut_off))
    assert names(folder) == [whole]


def test_the_same_rows_are_the_same_part_and_a_row_in_two_parts_counts_once(tmp_path):
    folder = str(tmp_path / "states")
    rows = [("a", row, 1) for row in range(4)]
    assert write(folder, rows) == write(folder, rows[::-1])
    write(folder, [*rows[2:], ("a", 9, 1)])
    assert len(names(folder)) == 2
    found, _ = state_files.sample(folder, names(folder), layer=1, group="a", label=1, most=10)
    assert sorted(found["row_id"].to_pylist()) == ["r0", "r1", "r2", "r3", "r9"]


def test_a_sample_is_the_same_whatever_the_parts_and_for_all_layers(tmp_path):
    rows = [("a", row, 1) for row in range(50)]
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    write(one, rows)
    for start in range(0, 50, 7):
        write(many, rows[start : start + 7])
    chosen = [
        state_files.sample(folder, names(folder), layer=layer, group="a", label=1, most=12)[0]["row_id"].to_pylist()
        for folder in (one, many)
        for layer in range(N_STATES)
    ]
    assert len(chosen[0]) == 12
    assert all(other == chosen[0] for other in chosen)


def test_the_states_are_read_by_layer_without_this_project(tmp_path):
    folder = str(tmp_path / "states")
    write(folder, [("a", row, 1) for row in range(3)])
    table = pq.read_table(f"{folder}/hidden", filters=[("layer", "=", 2)])
    assert sorted(table["row_id"].to_pylist()) == ["r0", "r1", "r2"]
    assert pa.types.is_fixed_size_list(table["hidden"].type)


def test_a_paired_comparison_has_the_same_requests_on_both_sides(tmp_path):
    folder = str(tmp_path / "states")
    write(folder, [("own", row, None) for row in range(30)] + [("none", row, None) for row in range(3, 30)])
    one = Comparison.of_personas("own", "none")
    to = str(tmp_path / "sample.parquet")
    found = comparison.gather(folder, names(folder), one, layer=1, most=20, to=to)
    half = int(found.labels_N.sum())
    assert len(found.labels_N) == 2 * half
    assert found.hidden_ND[:half, 0].tolist() == found.hidden_ND[half:, 0].tolist()
    assert found.hidden_ND[:half, 2].tolist() == [3.0] * half
    assert found.blocks_N[:half].tolist() == found.blocks_N[half:].tolist()
    again = comparison.read(to)
    for name in ("hidden_ND", "labels_N", "blocks_N"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    row = comparison.layer_row(found, one, layer=1, n_components=2, seed=0)
    assert (row["group"], row["rows"], row["rows_other"]) == ("own / none", half, half)
    assert row["moved"] > 0


def test_too_few_rows_have_no_numbers(tmp_path):
    folder = str(tmp_path / "states")
    write(folder, [("a", 0, 1), ("a", 1, 0)])
    one = Comparison.of_statements("a")
    sample = comparison.gather(folder, names(folder), one, layer=0, most=9, to=str(tmp_path / "s.parquet"))
    row = comparison.layer_row(sample, one, layer=0, n_components=2, seed=0)
    assert row == {"group": "a", "layer": 0, "rows": 1, "rows_other": 1}


@pytest.fixture
def statements():
    from persona.inputs.reader import read_split
    from persona.inputs.splits import plan_splits
    from persona.locating.statements import Columns, check_columns, validate

    def read(uri: str, spec: str = "") -> tuple[list[dict], list[str]]:
        columns = Columns.parse(spec, "--statement-columns")
        splits = plan_splits(uri, flag="--statements")
        check_columns(splits, columns, flag="--statement-columns")
        both = [validate(records, columns, 4) for split in splits for records in read_split(split, max_row_mb=1)]
        good = [row for table, _ in both for row in table.to_pylist()]
        return good, [row["reason"] for _, bad in both for row in bad.to_pylist()]

    return read


def test_statements_are_read_with_labels_of_every_kind(statements, tmp_path):
    path = tmp_path / "s.jsonl"
    labels = ["1", "0", "yes", " No", "TRUE", "not matching", "perhaps", None]
    path.write_text(
        "".join(
            f'{{"g": "a", "text": "t{i}", "label": {"null" if x is None else chr(34) + x + chr(34)}}}\n'
            for i, x in enumerate(labels)
        )
    )
    good, bad = statements(str(path), "group=g")
    assert [row["label"] for row in good] == [1, 0, 1, 0, 1, 0]
    assert bad == ["label is not one of 1, true, yes, matching, 0, false, no, not matching", "label is missing"]
    table = pa.table(
        {"group": ["a"] * 3, "text": ["x", "y", ""], "label": [True, False, True], "statement_id": ["i", None, "k"]}
    )
    pq.write_table(table, tmp_path / "s.parquet")
    good, bad = statements(str(tmp_path / "s.parquet"))
    assert [(row["label"], len(row["row_id"])) for row in good] == [(1, 1), (0, 32)]
    assert bad == ["text is empty"]


def test_a_missing_column_is_named(statements, tmp_path):
    from persona.errors import InputError

    (tmp_path / "s.jsonl").write_text('{"group": "a", "statement": "t", "label": 1}\n')
    with pytest.raises(InputError, match="--statement-columns text=COLUMN"):
        statements(str(tmp_path / "s.jsonl"))
    assert statements(str(tmp_path / "s.jsonl"), "text=statement")[0][0]["text"] == "t"
