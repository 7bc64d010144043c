"""`compare` on the files that `evaluate` writes: what it prints and writes, and what it does not import."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import compare
from persona.storage import join, read_bytes, write_bytes
from tests.jobs.conftest import Job, arguments
from tests.persona.evaluation.test_many_runs import NONE, OWN, files

ROOT = Path(__file__).parents[2]


def save(root: Any, name: str, **changes: Any) -> str:
    """Writes an evaluation and returns its folder."""
    folder = join(str(root), name)
    found = files({"own": OWN, "none": NONE}, **changes)
    for file, data in zip(("metrics.json", "losses.parquet"), found, strict=True):
        write_bytes(join(folder, file), data)
    return folder


def test_seeds_and_controls_share_one_table_and_one_page(refuse: Job, s3: str) -> None:
    best = [save(s3, f"best-{seed}", seed=seed) for seed in range(2)]
    tuning = save(s3, "tuning", training={"empty_history": 1.0}, limited=True)
    done = refuse(compare, evaluations=(*best, tuning), out=f"{s3}/compared")
    assert done.code == 0
    heads, *rows = done.table.splitlines()
    assert heads.split("  ")[0] == "4 requests of 2 users"
    assert "difference to best-0/own" in heads
    assert [row.split()[0] for row in rows] == ["best-0/own", "best-0/none", "tuning/own", "tuning/none"]
    assert "warning: tuning was evaluated with --limit" in done.said
    found = json.loads(read_bytes(f"{s3}/compared/comparison.json"))
    assert found["rows"] == done.result["rows"]
    assert found["rows"][0]["seeds"] == [0, 1]
    assert found["rows"][1]["above_reference"]["mean"] == pytest.approx(11 / 12)
    assert b"best-0" in read_bytes(f"{s3}/compared/comparison.html")


def test_names_and_the_reference_can_be_given(refuse: Job, tmp_path: Path) -> None:
    folders = (save(tmp_path, "a"), save(tmp_path, "b", training={"epochs": 3}))
    flags: dict[str, Any] = {"evaluations": folders, "out": str(tmp_path / "out"), "names": ("ours", "theirs")}
    done = refuse(compare, **flags, against="theirs/none", dry_run=True)
    assert (done.code, done.result["against"]) == (0, "theirs/none")
    assert not (tmp_path / "out").exists()
    few = refuse(compare, **{**flags, "names": ("ours",)})
    assert (few.code, "as many as --evaluations, 2, not 1" in few.said) == (2, True)
    unknown = refuse(compare, **flags, against="unknown")
    assert (unknown.code, "ours/own, ours/none, theirs/own" in unknown.said) == (2, True)
    nothing = refuse(compare, **{**flags, "evaluations": (str(tmp_path / "c"), folders[0])})
    assert (nothing.code, "metrics.json does not exist" in nothing.said) == (2, True)


def test_it_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    flags = arguments(evaluations=(save(tmp_path, "a"),), out=str(tmp_path / "out"))
    code = (
        "import sys\nfrom jobs import compare\nfrom jobs.runtime import cli\n"
        f"assert cli.run(compare.Config, compare.main, {flags}) == 0\n"
        "print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "comparison.html").exists()


def test_what_judges_say_is_on_the_page(refuse: Job, tmp_path: Path) -> None:
    interval = {"mean": 3.5, "low": 3.0, "high": 4.0}
    row = {"judge": "http/strong", "variant": "own", "judgements": 20, "unparsed": 3, "tasks": {}}
    no_score = {"persona_score": None, "without_toxicity": None, "no_score_because": "its swap gap is not above 0"}
    scores = [
        {**row, "persona_score": interval, "without_toxicity": interval, "swap_gap": interval, "no_score_because": ""},
        {**row, "variant": "bare", "swap_gap": {"mean": 0.0, "low": -1.0, "high": 1.0}, **no_score},
    ]
    write_bytes(str(tmp_path / "judged" / "judged.json"), json.dumps({"scores": scores}).encode())
    flags: dict[str, Any] = {"evaluations": save(tmp_path, "a"), "out": str(tmp_path / "out")}
    done = refuse(compare, **flags, judged=str(tmp_path / "judged"))
    assert done.result["judged"] == [{"name": "judged", "scores": scores}]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "3.50" in page
    assert "none: its swap gap is not above 0" in page
    assert "3 of 20" in page
    write_bytes(str(tmp_path / "judged" / "judged.json"), b"[]")
    done = refuse(compare, **flags, judged=str(tmp_path / "judged"))
    assert (done.code, "is not from jobs.judge" in done.said) == (2, True)
