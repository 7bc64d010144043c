"""The end of a training run: which checkpoint becomes the plug, and what the summary says of its personas."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from jobs.runtime.training.held_out import PERSONAS, cautions, selected, summarize
from jobs.runtime.training.inputs import with_other_history
from persona.inputs.histories import bucket_of
from persona.options import PersonaKind, RetrievalOptions, TrainingOptions
from persona.store.join import join_histories
from persona.store.store import Store
from tests.jobs.conftest import requests

REPORTED = [
    ("early", {"step": 10, "validation_loss": 2.0}),
    ("best", {"step": 20, "validation_loss": 1.5}),
    ("as good", {"step": 30, "validation_loss": 1.5}),
    ("last", {"step": 40, "validation_loss": 1.7}),
]


def losses(other: dict[str, float]) -> dict[str, list[Any]]:
    """Two requests of each user: own has 2 nats, none 3, and other as given."""
    rows = [
        {
            "request_id": f"{user}-{number}",
            "user_id": user,
            "target": "a b",
            "n_behaviors": 3,
            "persona": str(persona),
            "nats": {"own": 2.0, "none": 3.0, "other": nats}[persona],
            "tokens": 2,
        }
        for user, nats in other.items()
        for number in range(2)
        for persona in PERSONAS
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_the_best_checkpoint_is_the_first_of_the_lowest_loss_and_the_last_one_the_last() -> None:
    assert selected(REPORTED[::-1], "best")[0] == "best"
    assert selected(REPORTED[::-1], "last")[0] == "last"


def test_own_ahead_of_other_needs_no_warning() -> None:
    found = summarize(losses({"u": 4.0, "v": 5.0, "w": 6.0}))
    assert found is not None
    assert (found["requests"], found["users"], found["warning"]) == (6, 3, "")
    assert found["loss"]["own"]["mean"] == 1.0  # nats a token
    assert found["loss_saved_by_own"]["none"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["loss_saved_by_own"]["other"] == {"mean": 1.5, "low": 1.0, "high": 2.0}


@pytest.mark.parametrize(
    ("other", "beginning"),
    [
        ({"u": 1.0, "v": 1.5, "w": 1.0}, "own is behind other on held-out users: it saves -0.4167 nats a token [-0.5"),
        ({"u": 1.0, "v": 4.0, "w": 2.0}, "own is not ahead of other on held-out users: it saves +0.1667 nats a token"),
    ],
)
def test_own_not_ahead_of_other_is_a_warning_with_what_to_try(other: dict[str, float], beginning: str) -> None:
    found = summarize(losses(other))
    assert found is not None
    assert found["warning"].startswith(beginning)
    for advice in ("--epochs", "--persona-gain", "--alignment", "as_of", "docs/training.md"):
        assert advice in found["warning"]


def test_a_single_user_gives_no_interval_and_prompt_tuning_no_personas() -> None:
    found = summarize(losses({"u": 4.0}))
    assert found is not None
    assert found["loss_saved_by_own"]["other"] == {"mean": 1.0, "low": None, "high": None}
    assert "of a single user" in found["warning"]
    assert summarize(None) is None


def test_the_other_users_are_those_of_an_evaluation(filled_store: Path) -> None:
    store = Store.open(str(filled_store)).snapshot("behaviors")
    asked = requests()
    times = pa.array([row["as_of"] for row in asked], pa.timestamp("us", "UTC"))
    table = pa.Table.from_pylist([{"request_id": row["request_id"], "user_id": row["user_id"]} for row in asked])
    table = table.append_column("as_of", times)
    buckets = bucket_of(table["user_id"].to_pylist(), store.n_buckets)
    table = table.append_column("bucket", pa.array(buckets)).append_column("history", pa.array([b""] * len(asked)))
    found = with_other_history(table, store=store, max_behaviors=3)
    seen = dict(zip(found["request_id"].to_pylist(), found["other_history"].to_pylist(), strict=True))
    for bucket in {int(bucket) for bucket in buckets}:
        part = table.drop_columns(["history"]).filter(pa.array(buckets == bucket))
        evaluated = join_histories(part, store, bucket, persona=PersonaKind.OTHER, max_behaviors=3)
        for row in evaluated.to_pylist():
            assert seen.pop(row["request_id"]) == row["history"]
            assert row["n_behaviors"] > 0
    assert not seen


@pytest.mark.parametrize(
    ("n_steps", "training", "retrieve", "expected"),
    [
        (775, {}, 0, []),
        (155, {}, 0, ["in fewer than 310 steps"]),
        (50, {}, 0, ["in fewer than 310 steps", "after 50 of --persona-warmup 100 steps the persona has 50% of its"]),
        (50, {"persona_warmup": 0}, 0, ["in fewer than 310 steps"]),
        (50, {"empty_history": 1.0, "alignment": 0.0}, 0, ["in fewer than 310 steps"]),
        (775, {}, 2, ["with alignment a plug does not learn to read retrieved texts"]),
        (775, {"alignment": 0.0}, 2, []),
    ],
)
def test_settings_that_gained_little_are_warned_of(
    n_steps: int, training: dict[str, float], retrieve: int, expected: list[str]
) -> None:
    spec: Any = SimpleNamespace(training=TrainingOptions(**training), retrieval=RetrievalOptions(retrieve=retrieve))
    found = cautions(spec, n_steps)
    assert [name for name, _ in found] == ["warning"] * len(expected)
    assert all(said.startswith(beginning) for (_, said), beginning in zip(found, expected, strict=True))
