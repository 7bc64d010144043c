"""What the size of a training pass depends on."""

import pyarrow as pa

from jobs.runtime.training.inputs import longest_values

ROWS = pa.table(
    {
        "request_id": ["a", "b", "c"],
        "input": pa.array(["four", "ééé", None], pa.large_string()),
        "target": pa.array(["x", "yy", "z"], pa.large_string()),
        "retrieved": pa.array([["one", "two"], None, ["three!!"]], pa.list_(pa.large_string())),
        "n_behaviors": [3, 500, 0],
    }
)


def test_the_longest_value_of_each_column_is_found_in_bytes() -> None:
    longest = longest_values(ROWS)
    assert longest.to_pylist() == [{"input": "ééé", "target": "yy", "retrieved": ["three!!"], "n_behaviors": 500}]
    # Parts of parts, one of them empty.
    parts = [longest_values(part) for part in (ROWS.slice(0, 1), ROWS.slice(1, 0), ROWS.slice(1))]
    assert longest_values(pa.concat_tables(parts)) == longest
