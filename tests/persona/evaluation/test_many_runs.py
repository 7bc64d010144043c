"""The comparison of several evaluations, on four requests with numbers computed by hand."""

import io
import json
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.errors import InputError, UsageError
from persona.evaluation.many_runs import compare
from persona.evaluation.saved_run import Evaluation
from persona.options import PlugOptions, TrainingOptions

# Requests a and b belong to user u, c and d to v.
USERS, TOKENS = {"a": "u", "b": "u", "c": "v", "d": "v"}, {"a": 4, "b": 5, "c": 1, "d": 2}
OWN, NONE = [8.0, 10.0, 1.0, 4.0], [8.0, 15.0, 5.0, 6.0]


def files(
    nats: dict[str, list[float]],
    *,
    seed: int = 0,
    rejected: dict[str, list[float]] | None = None,
    tokens: dict[str, int] = TOKENS,
    users: dict[str, str] = USERS,
    training: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **metrics: Any,
) -> tuple[bytes, bytes]:
    """What `evaluate` writes: metrics.json and losses.parquet, the requests out of order."""
    ids = list(tokens)[::-1]
    rows = [
        {"request_id": one, "user_id": users[one], "persona": persona, "n_behaviors": 1}
        | {"nats": values[list(tokens).index(one)], "tokens": tokens[one]}
        | ({} if rejected is None else {"rejected_nats": rejected[persona][list(tokens).index(one)]})
        for persona, values in nats.items()
        for one in ids
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    found = {
        "training": {**asdict(TrainingOptions(seed=seed)), "requests": 100, **(training or {})},
        "settings": {
            "personas": list(nats),
            "plug": "p",
            "plug_fingerprint": f"f{seed}",
            "plug_options": asdict(PlugOptions()),
            "llm": {"fingerprint": "l"},
            "encoder": {"fingerprint": "e"},
            "requests": "r",
            "retrieve": 0,
            "retriever": "recency",
            "retrieve_tokens": 256,
            **(settings or {}),
        },
        "limited": False,
        "scores": {},
        "score_intervals": {},
        **metrics,
    }
    return json.dumps(found).encode(), sink.getvalue()


def evaluation(name: str, nats: dict[str, list[float]] | None = None, **changes: Any) -> Evaluation:
    return Evaluation.read(name, *files(nats or {"own": OWN, "none": NONE}, **changes), source=name)


def rows_of(*evaluations: Evaluation, against: str | None = None) -> dict[str, dict[str, Any]]:
    rows = compare(evaluations, against=against, seed=0)["rows"]
    return {f"{row['name']}/{row['persona']}": row for row in rows}


def interval(mean: float, low: float, high: float) -> Any:
    return pytest.approx({"mean": mean, "low": low, "high": high})


def test_plugs_that_differ_only_in_the_seed_share_a_row_with_their_spread() -> None:
    found = rows_of(evaluation("s0"), evaluation("s1", {"own": [10.0, 10.0, 1.0, 4.0], "none": NONE}, seed=1))
    assert list(found) == ["s0/own", "s0/none"]
    own, none = found.values()
    assert (own["seeds"], own["evaluations"], own["above_reference"]) == ([0, 1], ["s0", "s1"], None)
    # 23 and 25 nats for 12 tokens. A bootstrap sample may be u twice (19 nats on average for 9 tokens) or v (5 for 3).
    assert own["loss"] == interval(2.0, 5 / 3, 19 / 9)
    assert own["loss_of_seeds"] == {
        "low": pytest.approx(23 / 12),
        "high": pytest.approx(25 / 12),
        "deviation": pytest.approx(1 / 12 * 2**0.5),
        "values": pytest.approx([23 / 12, 25 / 12]),
    }
    # Paired: with none, u has 4 nats more than the mean of own, and v 6 more.
    assert none["above_reference"] == none["above_own"] == interval(10 / 12, 4 / 9, 2.0)
    assert none["loss_of_seeds"]["deviation"] == 0


def test_any_other_difference_makes_another_row_and_is_listed() -> None:
    plain, slower = evaluation("plain"), evaluation("slower", training={"learning_rate": 1e-3})
    retrieving = evaluation("bm25", settings={"retrieve": 4, "retriever": "bm25"})
    found = compare([plain, slower, retrieving, evaluation("other data", seed=0)], against=None, seed=0)
    assert {(row["name"], tuple(row["seeds"])) for row in found["rows"]} == {
        (name, (0,)) for name in ("plain", "slower", "bm25", "other data")
    }
    assert found["differing"]["slower"] == {
        "learning_rate": 1e-3,
        "retrieve": 0,
        "retriever": None,
        "retrieve_tokens": None,
    }
    assert found["differing"]["bm25"]["retriever"] == "bm25"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("soft_position", {"settings": {"prompt": {"soft_position": "start"}}}),
        ("llm_quantization", {"settings": {"llm_quantization": "nf4"}}),
        ("max_input_tokens", {"settings": {"max_input_tokens": 32}}),
        ("max_behaviors", {"settings": {"max_behaviors": 8}}),
        ("query_prompt", {"settings": {"query_prompt": "query: "}}),
        ("select", {"training": {"select": "last"}}),
        ("trained_retrieve", {"training": {"retrieve": 4, "retriever": "bm25", "retrieve_tokens": 256}}),
    ],
)
def test_plugs_that_read_or_were_trained_otherwise_are_no_seeds_of_one_plug(name: str, changes: dict[str, Any]) -> None:
    found = compare([evaluation("plain"), evaluation("other", seed=1, **changes)], against=None, seed=0)
    assert [(row["name"], row["seeds"]) for row in found["rows"] if row["persona"] == "own"] == [
        ("plain", [0]),
        ("other", [1]),
    ]
    assert name in found["differing"]["other"]


def test_seeds_of_one_plug_may_have_been_trained_in_passes_of_another_size() -> None:
    found = rows_of(evaluation("a"), evaluation("b", seed=1, training={"micro_batch": 4}))
    assert found["a/own"]["seeds"] == [0, 1]


def test_an_option_that_an_older_plug_lacks_has_its_default() -> None:
    old = evaluation("old")
    for options in (old.metrics["training"], old.metrics["settings"]["plug_options"]):
        for name in ("contrast", "recency"):
            options.pop(name, None)
    assert list(rows_of(old, evaluation("new", seed=1))) == ["old/own", "old/none"]
    assert "new/own" in rows_of(old, evaluation("new", seed=1, training={"contrast": 0.3}))


def test_the_reference_is_chosen_by_name() -> None:
    first, second = evaluation("a"), evaluation("b", {"none": NONE}, training={"empty_history": 1.0})
    # own saves 5 nats for the 9 tokens of u, and 6 for the 3 of v.
    below = interval(-11 / 12, -2.0, -5 / 9)
    above = interval(11 / 12, 5 / 9, 2.0)
    for against in ("b", "b/none"):
        found = rows_of(first, second, against=against)
        assert found["b/none"]["above_reference"] is None
        assert found["a/own"]["above_reference"] == below
        assert found["a/none"]["above_reference"] == interval(0, 0, 0)
        # above_own refers to the own row of the same plug, whatever the reference; b has none.
        assert (found["a/own"]["above_own"], found["b/none"]["above_own"]) == (None, None)
        assert found["a/none"]["above_own"] == above
    assert rows_of(second, first, against="a")["a/own"]["above_reference"] is None
    for against, evaluations in (("c", (first, second)), (None, (second, first))):
        with pytest.raises(UsageError, match=r"no such row; the rows are .*b/none"):
            compare(evaluations, against=against, seed=0)


def test_different_requests_are_refused_with_their_number() -> None:
    whole = evaluation("whole")
    fewer = {"a": 4, "b": 5, "c": 1}
    part = evaluation("part", {"own": OWN[:3]}, tokens=fewer, limited=True)
    with pytest.raises(InputError, match="1 of 4 are only in whole, 0 of 3 only in part; .* without --limit"):
        compare([whole, part], against=None, seed=0)
    with pytest.raises(InputError, match="differ in the tokens of 1 requests, the first is 'b'"):
        compare([whole, evaluation("another", tokens={**TOKENS, "b": 6}, seed=1)], against=None, seed=0)


def test_a_limit_is_a_warning_and_two_plugs_with_one_name_are_refused() -> None:
    found = compare([evaluation("x"), evaluation("y", limited=True, seed=1)], against=None, seed=0)
    assert found["warnings"] == ["y was evaluated with --limit: not the numbers of the whole set"]
    with pytest.raises(UsageError, match="both named 'x'; give --names"):
        compare([evaluation("x"), evaluation("x", training={"epochs": 9})], against=None, seed=0)


def test_rankings_are_means_over_the_seeds() -> None:
    right, wrong = [9.0, 11.0, 2.0, 5.0], [7.0, 9.0, 0.0, 3.0]
    nats = {"own": OWN, "none": NONE}
    one = evaluation("a", nats, rejected={"own": right, "none": NONE})
    two = evaluation("b", nats, rejected={"own": [9.0, 9.0, 0.0, 4.0], "none": NONE}, seed=1)
    own = rows_of(one, two)["a/own"]["ranking"]
    # With one seed all four are right; with the other: right, wrong, wrong, tie.
    assert own["likelier"] == interval((1 + 0.375) / 2, 0.625, 0.75)
    # Under `none` each pair is a tie, so the gain over none ranks as the loss does.
    assert own["calibrated"] == own["likelier"]
    assert rows_of(one, evaluation("b", nats, seed=1))["a/own"]["ranking"] == {}
    assert rows_of(evaluation("a", nats, rejected={"own": wrong, "none": NONE}))["a/own"]["ranking"]["likelier"][
        "mean"
    ] == pytest.approx(0)


def test_scores_are_those_of_the_evaluated_variant() -> None:
    scored = {"scores": {"own": {"rouge1": 0.2}, "own-bm25-4": {"rouge1": 0.4}}}
    scored["score_intervals"] = {"own": {"rouge1": {"mean": 0.2, "low": 0.1, "high": 0.3}}}
    alone = rows_of(evaluation("a", **scored))
    assert alone["a/own"]["scores"]["rouge1"]["interval"]["high"] == 0.3
    assert alone["a/none"]["scores"] == {}
    retrieving = {"retrieve": 4, "retriever": "bm25"}
    assert rows_of(evaluation("a", **scored, settings=retrieving))["a/own"]["scores"]["rouge1"]["value"] == 0.4
    seeds = rows_of(evaluation("a", **scored), evaluation("b", seed=1, scores={"own": {"rouge1": 0.3}}))
    found = seeds["a/own"]["scores"]["rouge1"]
    assert (found["value"], found["interval"], found["of_seeds"]["high"]) == (pytest.approx(0.25), None, 0.3)


def test_files_that_are_not_an_evaluation_are_refused() -> None:
    metrics, losses = files({"own": OWN})
    for broken in ((b"{", losses), (metrics, b"PAR1"), (b"{}", losses)):
        with pytest.raises(InputError, match="^there: metrics.json"):
            Evaluation.read("x", *broken, source="there")
    rows = pq.read_table(pa.BufferReader(losses))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables([rows, rows.slice(0, 1)]), sink)
    with pytest.raises(InputError, match="does not have each request once for each persona"):
        Evaluation.read("x", metrics, sink.getvalue(), source="there")


def test_a_plug_trained_without_history_is_marked_as_the_control() -> None:
    found = rows_of(evaluation("a"), evaluation("b", training={"empty_history": 1.0}))
    controls = [label for label, row in found.items() if row["trained_without_history"]]
    assert controls == ["b/own", "b/none"]
