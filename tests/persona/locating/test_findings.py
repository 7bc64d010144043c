"""What a layer's runs add up to, and the headlines of a group."""

import numpy as np
import pyarrow as pa
import pytest

from persona.locating import findings
from persona.locating.runs import ScanOptions, run
from tests.persona.locating.test_scan import planted

RUNS = pa.table(
    {
        "number": [0, 1, 2],
        "score": [5.0, 9.0, 7.0],
        "score_shuffled": [6.0, 8.0, 1.0],
        "threshold": [0.1, 0.1, 0.2],
        "units": [[0, 3], [3], [1, 3]],
        "n_found": [4, 0, 2],
        "n_scanned": [8, 8, 8],
        "precision": [1.0, float("nan"), 0.5],
        "recall": [0.5, 0.0, 0.25],
        "units_shuffled": [[2], [2, 3], []],
    }
)


def test_the_runs_of_a_layer_add_up_to_frequent_units_and_a_p():
    found = findings.scan_summary(RUNS, 5)
    assert (found["scan_score"], found["scan_score_shuffled"]) == (7.0, 6.0)
    assert found["scan_p"] == 2 / 4  # one of three shuffled scores reaches the median, and the median itself
    assert (found["units"], found["units_shuffled"]) == ([3], [2])
    assert (found["scan_precision"], found["scan_recall"]) == (0.75, 0.25)
    rows = findings.scan_rows("a", 7, RUNS)
    assert rows.schema.equals(findings.SCAN)
    assert rows["layer"].to_pylist() == [7, 7, 7]
    assert rows["run"].to_pylist() == [0, 1, 2]


def test_most_units_that_one_run_finds_are_not_those_of_most_runs():
    options = ScanOptions(score="berk-jones", tails="both", restarts=1, seed=0)
    runs = [run(planted(0.0), number, options) for number in range(12)]
    union = set().union(*(one.units.tolist() for one in runs))
    by_run = pa.table({"units": [one.units.tolist() for one in runs]})
    lists = dict.fromkeys(("units", "units_shuffled"), by_run["units"])
    numbers = {
        name: [getattr(one, name) for one in runs] for name in ("score", "score_shuffled", "precision", "recall")
    }
    frequent = findings.scan_summary(pa.table({**numbers, **lists}), 40)["units"]
    assert len(union) > 1.5 * len(frequent)


def test_headlines_name_the_best_layers_and_where_a_probe_reads_nearly_as_well():
    rows = [
        {"group": "a", "layer": layer, "rows": 9, "rows_other": 8, "auc": auc, "auc_shuffled_high": 0.55,
         "silhouette": silhouette, "silhouette_shuffled": 0.0}
        for layer, (auc, silhouette) in enumerate([(0.5, None), (0.85, 0.1), (0.87, 0.2), (0.9, 0.15)])
    ]  # fmt: skip
    [found] = findings.headlines(rows)
    assert (found["auc"], found["auc_layer"], found["readable_from"]) == (0.9, 3, 2)  # 0.5 + 0.9 · 0.4 = 0.86
    assert (found["silhouette"], found["silhouette_layer"]) == (0.2, 2)
    assert "moved" not in found and "scan_p" not in found


@pytest.mark.parametrize("auc", [0.5, 0.3, 0.0])
def test_a_probe_that_reads_nothing_has_a_headline_too(auc):
    rows = [
        {"group": "a", "layer": layer, "rows": 9, "rows_other": 8, "auc": one, "auc_shuffled_high": 0.5}
        for layer, one in enumerate([auc - 0.1, auc])
    ]
    [found] = findings.headlines(rows)
    assert (found["auc"], found["readable_from"]) == (auc, 1)
    assert np.isfinite(found["auc"])
