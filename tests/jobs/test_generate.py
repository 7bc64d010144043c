"""`generate` on a real Ray: whose history is told, what is answered, and what is left alone the next time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs import generate
from persona.engines.base import new_engine
from persona.inputs import histories as persona_histories
from persona.inputs.requests import SCHEMA
from persona.models import resolve as persona_models
from persona.models.encoder import TextEncoder
from persona.options import Decoding, PersonaKind
from persona.plug import folder as plug_folder, record as plug_record
from persona.plug.request_tables import answer_all
from persona.retrieval.ranking import best_texts
from persona.store.join import join_histories
from persona.store.store import Store
from tests.jobs.conftest import BUCKETS, START, Job, Row, Rows, behaviors, new_plug, requests, stored, write


@pytest.fixture
def flags(store: Path, plug: str, tmp_path: Path) -> dict[str, Any]:
    """Greedy answers to a few requests, two of them of a user without history."""
    asked = [*requests(3, 2), *requests(1, 2, first_user=50)]
    source = write(str(tmp_path / "requests.parquet"), asked)
    decoding = {"beams": 1, "max_new_tokens": 8, "precision": "fp32", "batch_size": 4}
    return {"requests": source, "store": str(store), "plug": plug, "actors": 1, **decoding}


def outputs(answers: Rows, variant: str) -> dict[str, str]:
    return {request: row["output"] for (request, of), row in answers.items() if of == variant}


def expected(uri: str, plug: str, asked: list[Row], persona: Any, decoding: Decoding) -> dict[str, str]:
    """What the plug's own classes answer, request by request."""
    store, folder = Store.open(uri), Path(plug)
    record = plug_record.read(folder)
    encoder, llm = (persona_models.resolve(card["name"], flag="") for card in (record.encoder, record.llm))
    engine = new_engine("local", llm, max_input_tokens=record.max_input_tokens, precision="fp32", batch_size=1)
    answerer = plug_folder.load_answerer(folder, encoder=encoder, engine=engine, batch_size=1)
    found = {}
    for row in asked:
        bucket = int(persona_histories.bucket_of([row["user_id"]], BUCKETS)[0])
        table = pa.Table.from_pylist([{**row, "query": row["input"], "bucket": bucket}], schema=SCHEMA)
        joined = join_histories(table, store, bucket, persona=PersonaKind(persona), max_behaviors=record.max_behaviors)
        joined = joined.append_column("persona", pa.array([persona]))
        found[row["request_id"]] = answer_all(answerer, joined, decoding)["output"][0].as_py()
    return found


def test_answers_of_each_persona_are_those_of_the_plug_alone(do: Job, flags: dict[str, Any], plug: str) -> None:
    personas = ("own", "none", "other", "mean")
    done = do(generate, persona=personas, **flags)
    assert done.code == 0
    assert (done.result["requests"], done.result["answered"]) == (8, 32)
    assert done.result["without_history"] == 2
    answers = stored(flags["store"], "generations")
    asked = [*requests(3, 2), *requests(1, 2, first_user=50)]
    greedy = Decoding(beams=1, max_new_tokens=8)
    for persona in personas:
        assert outputs(answers, persona) == expected(flags["store"], plug, asked, persona, greedy), persona
    different = [outputs(answers, persona) for persona in personas]
    assert all(a != b for i, a in enumerate(different) for b in different[:i]), "the persona changes nothing"
    assert outputs(answers, "own")["r50-0"] == outputs(answers, "none")["r50-0"]
    assert answers["r50-0", "own"]["n_behaviors"] == 0
    # Asked on the second day, when one behavior lay in the past, and on the third.
    assert [answers[f"r1-{i}", "own"]["n_behaviors"] for i in range(2)] == [1, 2]
    assert {row["n_tokens"] for row in answers.values()} <= set(range(1, 10))

    again = do(generate, persona=personas, **flags)
    assert (again.code, again.result["answered"], again.result["already_answered"]) == (0, 0, 32)
    assert stored(flags["store"], "generations") == answers


def test_only_what_has_changed_is_answered_again(do: Job, flags: dict[str, Any]) -> None:
    do(generate, **flags)
    before = stored(flags["store"], "generations")
    asked = requests(3, 2)
    write(flags["requests"], [{**asked[0], "input": "another title"}, *asked[1:], *requests(1, 1, first_user=4)])
    done = do(generate, **flags)
    assert (done.result["answered"], done.result["already_answered"]) == (2, 5)
    after = stored(flags["store"], "generations")
    assert {key for key in after if after[key] != before.get(key)} == {("r0-0", "own"), ("r4-0", "own")}

    longer = do(generate, **{**flags, "max_new_tokens": 9})
    assert (longer.result["answered"], longer.result["already_answered"]) == (7, 0)
    found = stored(flags["store"], "generations")
    assert set(found) == set(after), "the answers to requests that nobody asks now stay"
    assert sum(found[key]["fingerprint"] != after[key]["fingerprint"] for key in after) == 7


def test_what_makes_an_answer_out_of_date(plug: str, models: dict[str, str], tmp_path: Path) -> None:
    record = plug_record.read(Path(plug))
    where = {"fingerprint": plug_record.fingerprint(Path(plug)), "record": record}
    other = Path(new_plug(tmp_path / "other", models["encoder"], models["llama"], seed=1))
    config = generate.Config(requests="r", store="s", plug="p", decoding=Decoding(beams=1))
    row = {"input": "a", "query": "b", "history_hash": "c", "persona": "own", "as_of": None}

    def fingerprint(row: Row = row, config: generate.Config = config, **changed: Any) -> str:
        return generate.answer_fingerprint(row, config, where | changed)

    same = [
        fingerprint({**row, "as_of": START}),
        fingerprint(config=replace(config, batch_size=1, requests="elsewhere")),
    ]
    assert set(same) == {fingerprint()}

    def decoding(**changed: Any) -> generate.Config:
        return replace(config, decoding=replace(config.decoding, **changed))

    different = [
        *(fingerprint({**row, name: "else"}) for name in ("input", "query", "history_hash", "persona")),
        fingerprint(config=decoding(max_new_tokens=9)),
        fingerprint(config=decoding(beams=2)),
        fingerprint(config=decoding(sample=True)),
        fingerprint(config=decoding(sample=True, seed=7)),
        fingerprint(fingerprint=plug_record.fingerprint(other)),
        fingerprint(record=replace(record, llm={**record.llm, "fingerprint": "else"})),
    ]
    assert len({*different, fingerprint()}) == len(different) + 1


def test_beams_and_sampling_with_a_seed_a_request(do: Job, flags: dict[str, Any], plug: str) -> None:
    asked = [*requests(3, 2), *requests(1, 2, first_user=50)]
    do(generate, **{**flags, "beams": 3, "variant": "beams"})
    sampling = {"sample": True, "sampling_temperature": 2.0, "top_p": 0.9}
    do(generate, **flags, **sampling, seed=1, variant="drawn")
    answers = stored(flags["store"], "generations")
    beams = Decoding(beams=3, max_new_tokens=8)
    assert outputs(answers, "beams") == expected(flags["store"], plug, asked, "own", beams)
    one, two = (Decoding(beams=1, max_new_tokens=8, **sampling, seed=seed) for seed in (1, 2))
    assert outputs(answers, "drawn") == expected(flags["store"], plug, asked, "own", one)
    assert outputs(answers, "drawn") != expected(flags["store"], plug, asked, "own", two)


def test_bad_requests_are_rejected_and_a_repeated_id_is_answered_once(do: Job, flags: dict[str, Any]) -> None:
    good = requests(1, 2)
    bad = [{**good[0], "user_id": None}, {**good[0], "input": " "}]
    write(flags["requests"], [*good, *bad, {**good[0], "input": "asked again"}])
    done = do(generate, **flags)
    assert done.code == 3
    assert (done.result["answered"], done.result["rejects"], done.result["repeated_ids"]) == (2, 2, 1)
    reasons = DeltaTable(f"{flags['store']}/rejects").to_pyarrow_table()["reason"].to_pylist()
    assert sorted(reasons) == ["input is empty", "user_id is missing"]


@pytest.mark.parametrize("retriever", ["recency", "bm25", "dense"])
def test_retrieved_texts_are_the_best_of_those_that_the_request_may_see(
    do: Job, flags: dict[str, Any], plug: str, tmp_path: Path, retriever: str
) -> None:
    written = behaviors()
    histories = write(str(tmp_path / "histories.parquet"), written)
    # The third behavior of user 1 was edited after it was encoded; it must not be taken for what was seen.
    edited = [
        {**row, "text": "title of review title of review"}
        if (row["user_id"], row["behavior_id"]) == ("user-1", "b2")
        else row
        for row in written
    ]
    write(histories, edited)
    asked = [*requests(3, 4), *requests(1, 1, first_user=50)]
    write(flags["requests"], asked)
    given = {**flags, "persona": ("bare", "own"), "retrieve": 2, "retriever": retriever, "retrieve_tokens": 24}
    done = do(generate, **given, texts=histories)
    assert (done.code, done.result["answered"]) == (0, 26)
    names = [f"{persona}-{retriever}-2" for persona in ("bare", "own")]
    assert done.result["variants"] == names
    answers = stored(flags["store"], "generations")

    folder = Path(plug)
    record = plug_record.read(folder)
    encoder, llm = (persona_models.resolve(card["name"], flag="") for card in (record.encoder, record.llm))
    engine = new_engine("local", llm, max_input_tokens=record.max_input_tokens, precision="fp32", batch_size=1)
    answerer = plug_folder.load_answerer(folder, encoder=encoder, engine=engine, batch_size=1, prefix_tokens=24)
    reader = TextEncoder(encoder, pooling="cls", max_tokens=32, precision="fp32")
    n_stale = 0
    for row in asked:
        mine = [one for one in written if one["user_id"] == row["user_id"] and one["timestamp"] < row["as_of"]][-3:]
        known = [None if (one["user_id"], one["behavior_id"]) == ("user-1", "b2") else one["text"] for one in mine]
        query_d, *vectors = reader.encode([row["input"], *(one["text"] for one in mine)]).vectors.astype("f4")
        vectors_Nd = np.array(vectors).reshape(len(mine), len(query_d))
        found = best_texts(known, 2, retriever, query=row["input"], query_d=query_d, vectors_Nd=vectors_Nd)
        known_later = [one["text"] for one in mine]
        later = best_texts(known_later, 2, retriever, query=row["input"], query_d=query_d, vectors_Nd=vectors_Nd)
        n_stale += len(names) * (later != found)
        history = vectors_Nd.astype("<f2").tobytes()
        for name, kind in zip(names, (PersonaKind.BARE, PersonaKind.OWN), strict=True):
            rows = [{**row, "query": row["input"], "history": history, "retrieved": found}]
            said = answerer.answer(rows, Decoding(beams=1, max_new_tokens=8), persona=kind)[0]
            assert answers[row["request_id"], name]["output"] == said.text

    again = do(generate, **given, texts=histories)
    assert (again.result["answered"], again.result["already_answered"]) == (0, 26)
    # The text is what it was again, so the answers that would have seen it are out of date, and no others.
    write(histories, written)
    mended = do(generate, **given, texts=histories)
    assert mended.result["answered"] == n_stale > 0
    shorter = do(generate, **{**given, "retrieve_tokens": 12, "persona": "bare"}, texts=histories)
    assert shorter.result["answered"] == 13


@pytest.mark.parametrize(
    ("flags_given", "message"),
    [
        ({"retrieve": 2}, "--retrieve 2 needs --texts"),
        ({"retrieve": -1}, "--retrieve -1: must be 0"),
        ({"texts": "h.parquet"}, "--texts has no effect without --retrieve"),
        ({"retriever": "bm25"}, "--retriever bm25 has no effect without --retrieve"),
        ({"columns": "text=body"}, "--columns names the columns of --texts"),
        (
            {"retrieve": 9, "retrieve_tokens": 8, "texts": "h.parquet"},
            "--retrieve-tokens 8: must be at least one a text",
        ),
    ],
)
def test_retrieval_that_cannot_work_is_refused(
    refuse: Job, flags: dict[str, Any], flags_given: dict[str, Any], message: str
) -> None:
    done = refuse(generate, **flags, **flags_given)
    assert (done.code, message in done.said) == (2, True)
