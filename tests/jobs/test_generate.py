"""Tests for `generate` on a real Ray: which history a request sees, what is answered, and what is skipped."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs import generate
from jobs.runtime import plugs
from jobs.runtime.job_options import PlugModels
from jobs.runtime.tally import Tally
from persona.engines import local
from persona.engines.base import EngineSettings
from persona.engines.options import EngineOptions
from persona.errors import UsageError
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
    """Greedy answers to `sample_requests`."""
    source = write(str(tmp_path / "requests.parquet"), sample_requests())
    decoding = {"beams": 1, "max_new_tokens": 8, "precision": "fp32", "batch_size": 4}
    return {"requests": source, "store": str(store), "plug": plug, "actors": 1, **decoding}


def sample_requests() -> list[Row]:
    """A few requests, two of them by a user without history."""
    return [*requests(3, 2), *requests(1, 2, first_user=50)]


def outputs(answers: Rows, variant: str) -> dict[str, str]:
    return {request: row["output"] for (request, of), row in answers.items() if of == variant}


def expected(uri: str, plug: str, rows: list[Row], persona: Any, decoding: Decoding) -> dict[str, str]:
    """The answers of the plug's own classes, one request at a time."""
    store, folder = Store.open(uri), Path(plug)
    record = plug_record.read(folder)
    encoder, llm = (persona_models.resolve(card["name"], flag="") for card in (record.encoder, record.llm))
    settings = EngineSettings(
        max_input_tokens=record.max_input_tokens, prompt=record.prompt, precision="fp32", batch_size=1
    )
    engine = local.load(llm, settings)
    answerer = plug_folder.load_answerer(folder, encoder=encoder, engine=engine, batch_size=1)
    found = {}
    for row in rows:
        bucket = int(persona_histories.bucket_of([row["user_id"]], BUCKETS)[0])
        table = pa.Table.from_pylist([{**row, "query": row["input"], "bucket": bucket}], schema=SCHEMA)
        joined = join_histories(table, store, bucket, persona=PersonaKind(persona), max_behaviors=record.max_behaviors)
        joined = joined.append_column("persona", pa.array([persona]))
        found[row["request_id"]] = answer_all(answerer, joined, decoding)["output"][0].as_py()
    return found


def test_answers_of_each_persona_are_those_of_the_plug_itself(do: Job, flags: dict[str, Any], plug: str) -> None:
    personas = ("own", "none", "other", "mean")
    done = do(generate, persona=personas, **flags)
    assert done.code == 0
    assert (done.result["requests"], done.result["answered"]) == (8, 32)
    assert done.result["without_history"] == 2
    answers = stored(flags["store"], "generations")
    greedy = Decoding(beams=1, max_new_tokens=8)
    for persona in personas:
        assert outputs(answers, persona) == expected(flags["store"], plug, sample_requests(), persona, greedy), persona
    different = [outputs(answers, persona) for persona in personas]
    assert all(a != b for i, a in enumerate(different) for b in different[:i]), "the persona has no effect"
    assert outputs(answers, "own")["r50-0"] == outputs(answers, "none")["r50-0"]
    assert answers["r50-0", "own"]["n_behaviors"] == 0
    # The requests are of the second and the third day; there is one behavior per day.
    assert [answers[f"r1-{i}", "own"]["n_behaviors"] for i in range(2)] == [1, 2]
    assert {row["n_tokens"] for row in answers.values()} <= set(range(1, 10))

    for engine in (None, "local"):  # the flag or its default: no answer becomes stale
        again = do(generate, persona=personas, engine=engine, **flags)
        assert (again.code, again.result["answered"], again.result["already_answered"]) == (0, 0, 32)
        assert again.result["stale"] == 0
        assert stored(flags["store"], "generations") == answers


def test_a_dry_run_shows_what_the_llm_reads(refuse: Job, flags: dict[str, Any]) -> None:
    done = refuse(generate, **flags, dry_run=True)
    limited = refuse(generate, **flags, dry_run=True, limit=2)
    assert limited.result["requests"] == 2
    n_requests = done.result["requests"]
    assert limited.result["cost"]["tflop"] == pytest.approx(done.result["cost"]["tflop"] * 2 / n_requests, abs=1e-3)
    assert done.result["prompt_example"] == "<s>[3 soft tokens][input]\n[target]</s>"
    write(flags["requests"], [{**row, "system": "Write."} for row in sample_requests()])
    done = refuse(generate, **flags, dry_run=True)
    assert (done.code, "the requests have a column 'system'" in done.said) == (2, True)


def test_an_unknown_engine_is_refused(refuse: Job, flags: dict[str, Any], plug: str) -> None:
    done = refuse(generate, engine="remote", **flags)
    assert (done.code, done.result) == (2, None)
    assert "--engine 'remote': must be local or vllm" in done.said
    config = generate.Config(requests="r", store="s", plug=plug, engine=EngineOptions(engine="remote"))
    with pytest.raises(UsageError, match="unknown name 'remote': persona.engines has no module"):
        generate.Generate(config, plugs.read_plug(plug), Tally(actor=None), n_threads=1)


def test_flags_of_vllm_need_vllm(refuse: Job, flags: dict[str, Any]) -> None:
    done = refuse(generate, **flags, tensor_parallel=2)
    assert (done.code, "--tensor-parallel 2 has no effect without --engine vllm" in done.said) == (2, True)
    done = refuse(generate, **flags, engine="vllm", gpus_per_actor=2)
    assert (done.code, "--gpus-per-actor 2 is for --engine local" in done.said) == (2, True)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_is_refused_where_it_is_not_installed(refuse: Job, flags: dict[str, Any]) -> None:
    done = refuse(generate, **flags, engine="vllm")
    assert (done.code, "--engine vllm: vLLM is not installed" in done.said) == (2, True)
    assert "pip install 'persona-plug[vllm]'" in done.said


def test_strengths_are_variants_beside_the_answers_of_before(do: Job, flags: dict[str, Any]) -> None:
    do(generate, **flags, persona=("own", "none"))
    before = stored(flags["store"], "generations")
    done = do(generate, **flags, persona=("own", "none"), persona_strength=(0, 1, 3))
    assert (done.result["answered"], done.result["already_answered"]) == (2 * 8, 2 * 8)
    assert done.result["variants"] == ["own-strength-0", "own", "own-strength-3", "none"]
    after = stored(flags["store"], "generations")
    assert {key: after[key] for key in before} == before
    none, own, strong = (outputs(after, variant) for variant in ("own-strength-0", "own", "own-strength-3"))
    assert none == outputs(after, "none") != own != strong
    of_one = {variant: after["r0-0", variant]["fingerprint"] for variant in done.result["variants"]}
    assert len(set(of_one.values())) == 4
    assert do(generate, **flags, persona_strength=(0, 3)).result["answered"] == 0


def test_a_strength_without_a_history_and_a_name_for_several_are_refused(refuse: Job, flags: dict[str, Any]) -> None:
    done = refuse(generate, **flags, persona="none", persona_strength=2)
    assert (done.code, "--persona-strength 2.0 has no effect on personas without a history" in done.said) == (2, True)
    done = refuse(generate, **flags, persona_strength=(1, 2), variant="mine")
    assert (done.code, "--variant names the answers of one persona" in done.said) == (2, True)


def test_only_changed_requests_are_answered_again(do: Job, flags: dict[str, Any]) -> None:
    do(generate, **flags)
    before = stored(flags["store"], "generations")
    first, *others = requests(3, 2)
    write(flags["requests"], [{**first, "input": "another title"}, *others, *requests(1, 1, first_user=4)])
    done = do(generate, **flags)
    assert (done.result["answered"], done.result["already_answered"]) == (2, 5)
    after = stored(flags["store"], "generations")
    assert {key for key in after if after[key] != before.get(key)} == {("r0-0", "own"), ("r4-0", "own")}

    longer = do(generate, **{**flags, "max_new_tokens": 9})
    assert (longer.result["answered"], longer.result["already_answered"]) == (7, 0)
    found = stored(flags["store"], "generations")
    assert set(found) == set(after), "answers to requests that are no longer in the input stay"
    assert sum(found[key]["fingerprint"] != after[key]["fingerprint"] for key in after) == 7


def test_what_makes_an_answer_out_of_date(plug: str, models: dict[str, str], tmp_path: Path) -> None:
    record = plug_record.read(Path(plug))
    ref = plugs.read_plug(plug)
    other = Path(new_plug(tmp_path / "other", models["encoder"], models["llama"], seed=1))
    config = generate.Config(requests="r", store="s", plug="p", decoding=Decoding(beams=1))
    row = {"input": "a", "query": "b", "system": None, "history_hash": "c", "persona": "own", "as_of": None}

    def fingerprint(row: Row = row, config: generate.Config = config, **changed: Any) -> str:
        return generate._answer_spec(config, replace(ref, **changed)).fingerprint(row)

    fp32 = PlugModels(precision="fp32")
    same = [
        fingerprint({**row, "as_of": START}),
        fingerprint(config=replace(config, batch_size=1, requests="elsewhere")),
        fingerprint(config=replace(config, engine=EngineOptions(engine="vllm"), models=fp32)),
    ]
    assert set(same) == {fingerprint()}

    def decoding(**changed: Any) -> generate.Config:
        return replace(config, decoding=replace(config.decoding, **changed))

    different = [
        *(fingerprint({**row, name: "else"}) for name in ("input", "query", "system", "history_hash", "persona")),
        fingerprint(config=decoding(max_new_tokens=9)),
        fingerprint(config=decoding(beams=2)),
        fingerprint(config=decoding(sample=True)),
        fingerprint(config=decoding(sample=True, seed=7)),
        fingerprint(fingerprint=plug_record.fingerprint(other)),
        fingerprint(record=replace(record, llm={**record.llm, "fingerprint": "else"})),
    ]
    assert len({*different, fingerprint()}) == len(different) + 1


def test_beams_and_sampling_with_one_seed_per_request(do: Job, flags: dict[str, Any], plug: str) -> None:
    rows = sample_requests()
    do(generate, **{**flags, "beams": 3, "variant": "beams"})
    sampling = {"sample": True, "sampling_temperature": 2.0, "top_p": 0.9}
    do(generate, **flags, **sampling, seed=1)
    answers = stored(flags["store"], "generations")
    beams = Decoding(beams=3, max_new_tokens=8)
    assert outputs(answers, "beams") == expected(flags["store"], plug, rows, "own", beams)
    one, two = (Decoding(beams=1, max_new_tokens=8, **sampling, seed=seed) for seed in (1, 2))
    assert outputs(answers, "own-sampled") == expected(flags["store"], plug, rows, "own", one)
    assert outputs(answers, "own-sampled") != expected(flags["store"], plug, rows, "own", two)


def test_bad_requests_are_rejected_and_a_repeated_id_is_answered_once(do: Job, flags: dict[str, Any]) -> None:
    good = requests(1, 2)
    bad = [{**good[0], "user_id": None}, {**good[0], "input": " "}]
    write(flags["requests"], [*good, *bad, {**good[0], "input": "a repeated id"}])
    done = do(generate, **flags)
    assert done.code == 3
    assert (done.result["answered"], done.result["rejects"], done.result["repeated_ids"]) == (2, 2, 1)
    assert "1 requests left out; of each id, the first counts" in done.table
    reasons = DeltaTable(f"{flags['store']}/rejects").to_pyarrow_table()["reason"].to_pylist()
    assert sorted(reasons) == ["input is empty", "user_id is missing"]


@pytest.mark.parametrize("retriever", ["recency", "bm25", "dense"])
def test_retrieved_texts_are_the_best_of_the_visible_ones(
    do: Job, flags: dict[str, Any], plug: str, tmp_path: Path, retriever: str
) -> None:
    written = behaviors()
    histories = write(str(tmp_path / "histories.parquet"), written)
    # The third behavior of user 1 was edited after it was encoded; the new text must not be retrieved.
    edited = [
        {**row, "text": "title of review title of review"}
        if (row["user_id"], row["behavior_id"]) == ("user-1", "b2")
        else row
        for row in written
    ]
    write(histories, edited)
    rows = [*requests(3, 4), *requests(1, 1, first_user=50)]
    write(flags["requests"], rows)
    given = {**flags, "persona": ("bare", "own"), "retrieve": 2, "retriever": retriever, "retrieve_tokens": 24}
    done = do(generate, **given, texts=histories)
    assert (done.code, done.result["answered"]) == (0, 26)
    names = [f"{persona}-{retriever}-2" for persona in ("bare", "own")]
    assert done.result["variants"] == names
    answers = stored(flags["store"], "generations")

    folder = Path(plug)
    record = plug_record.read(folder)
    encoder, llm = (persona_models.resolve(card["name"], flag="") for card in (record.encoder, record.llm))
    settings = EngineSettings(
        max_input_tokens=record.max_input_tokens, prompt=record.prompt, precision="fp32", batch_size=1
    )
    engine = local.load(llm, settings)
    answerer = plug_folder.load_answerer(folder, encoder=encoder, engine=engine, batch_size=1, retrieved_tokens=24)
    reader = TextEncoder(encoder, pooling="cls", max_tokens=32, precision="fp32")
    n_stale = 0
    for row in rows:
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
            one = {**row, "query": row["input"], "history": history, "retrieved": found}
            answer = answerer.answer([one], Decoding(beams=1, max_new_tokens=8), persona=kind)[0]
            assert answers[row["request_id"], name]["output"] == answer.text

    again = do(generate, **given, texts=histories)
    assert (again.result["answered"], again.result["already_answered"]) == (0, 26)
    # The original text is back: exactly the answers that now see it are out of date.
    write(histories, written)
    restored = do(generate, **given, texts=histories)
    assert restored.result["answered"] == n_stale > 0
    shorter = do(generate, **{**given, "retrieve_tokens": 12, "persona": "bare"}, texts=histories)
    assert shorter.result["answered"] == 13


@pytest.mark.parametrize(
    ("wrong", "message"),
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
    refuse: Job, flags: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    done = refuse(generate, **flags, **wrong)
    assert (done.code, message in done.said) == (2, True)
