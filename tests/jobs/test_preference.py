"""From requests to a plug with the preference loss, by the jobs of docs/style.md; and references that do not fit."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import evaluate, generate, pair, style, train
from jobs.runtime.reference import Reference
from jobs.runtime.texts import union_schema
from persona.errors import InputError
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.options import TrainingOptions
from persona.plug import folder as plug_folder
from persona.storage import join, local_folder, read_bytes
from persona.training.augmentation import with_rejected
from persona.training.step import objective
from tests.jobs.conftest import TRAINING, Job, behaviors, fill_store, requests, seen, stored, write
from tests.jobs.test_style import STYLES, read
from tests.jobs.test_train import curve, folders, killing_a_worker, record

PREFERENCE = {"preference": 0.4, "nll_weight": 0.5, "rejected": "rejected"}
SETTINGS: dict[str, Any] = {**TRAINING, "weights": "mean", "query_token": True, "learning_rate": 1e-2}


def rows_of(folder: str) -> list[dict[str, Any]]:
    with local_folder(folder) as local:
        return [row for file in sorted(local.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.soak
def test_all_steps_from_requests_to_a_plug_on_s3_with_a_killed_worker(
    do: Job, models: dict[str, str], plug: str, s3: str, tmp_path: Path
) -> None:
    store = fill_store(f"{s3}/store", models["encoder"], behaviors())
    asked = {"requests": write(f"{s3}/plain.jsonl", requests(4)), "out": f"{s3}/styled"}
    assert do(style, **asked, styles=write(f"{s3}/styles.jsonl", STYLES)).code == 0
    of_store = {"store": store, "plug": plug, "precision": "fp32"}
    answers = {"persona": "bare", "beams": 1, "max_new_tokens": 5}
    assert do(generate, requests=f"{s3}/styled", **of_store, **answers).code == 0
    paired = do(pair, requests=f"{s3}/styled", store=store, out=f"{s3}/paired")
    assert paired.code == 0
    bare = {key[0]: row["output"] for key, row in stored(store, "generations").items() if key[1] == "bare"}
    expected = {row["request_id"]: bare[row["request_id"]] for row in read(f"{s3}/styled")}
    expected = {name: text for name, text in expected.items() if text.strip()}
    found = rows_of(f"{s3}/paired")
    assert {row["request_id"]: row["rejected"] for row in found} == expected
    assert len(found) == len(expected) == paired.result["requests"] == 32 - paired.result["blank"]
    again = do(pair, requests=f"{s3}/styled", store=store, out=f"{s3}/paired")
    assert (again.code, rows_of(f"{s3}/paired")) == (0, found)

    of_reference = {"persona": "bare", "losses_only": True, "rejected": "rejected", "out": f"{s3}/reference"}
    assert do(evaluate, requests=f"{s3}/paired", **of_store, **of_reference).code == 0
    flags = {"requests": f"{s3}/paired", "store": store, "llm": models["llama"], "reference": f"{s3}/reference"}
    flags |= {"validation": f"{s3}/paired", "validation_rows": 999, **SETTINGS, **PREFERENCE}
    runs = str(tmp_path / "runs")
    with killing_a_worker(Path(runs), 2) as killed:
        done = do(train, **flags, runs=runs, plug=f"{s3}/plug", max_failures=1)
    assert killed
    assert done.code == 0
    losses = curve(f"{s3}/plug", "validation")[:, 1]
    assert losses[-1] < losses[0]
    training = record(f"{s3}/plug")["training"]
    assert (training["preference"], training["nll_weight"]) == (0.4, 0.5)
    assert done.result["validation_loss"] == pytest.approx(_objective(s3, models, store, found), abs=2e-5)


def _objective(s3: str, models: dict[str, str], store: str, rows: Sequence[dict[str, Any]]) -> float:
    """The loss of the saved plug in nats a token, from the losses that `evaluate` has written."""
    encoder, llm = (resolve(models[name], flag="") for name in ("encoder", "llama"))
    frozen = FrozenLLM.load(llm, precision="fp32", max_input_tokens=SETTINGS["max_input_tokens"])
    with local_folder(f"{s3}/plug") as folder:
        model = plug_folder.load(folder, encoder=encoder, llm=frozen)
    table = pq.read_table(pa.BufferReader(read_bytes(f"{s3}/reference/losses.parquet"))).to_pylist()
    reference = {row["request_id"]: row for row in table}
    whole = []
    for row in rows:
        nats = {f"reference_{name}": reference[row["request_id"]][name] for name in ("nats", "rejected_nats")}
        whole.append({**row, **nats, "history": b"".join(seen(store, row, 512))})
    options = TrainingOptions(preference=PREFERENCE["preference"], nll_weight=PREFERENCE["nll_weight"])
    batch = model.collate([*whole, *with_rejected(whole)])
    with torch.inference_mode():
        loss = objective(model(batch), whole, options).item()
    return loss / sum(map(len, batch.targets[: len(whole)]))


def union_rows(**columns: list[Any]) -> pa.Table:
    """Rows of one user as the exchange brings them together; the other columns are null."""
    n = len(next(iter(columns.values())))
    given = {"user_id": ["u"] * n, "bucket": [0] * n, **columns}
    return pa.table(
        [pa.array(given.get(field.name, [None] * n), field.type) for field in union_schema()], schema=union_schema()
    )


def test_losses_are_joined_by_request_and_texts_are_left_alone() -> None:
    rows = union_rows(
        request_id=["a", "b", "b", "a", None],
        input=["ask a", None, "ask b", None, None],
        text=[None, None, None, None, "a text"],
        reference_nats=[None, 2.0, None, 1.0, None],
        reference_tokens=[None, 20, None, 10, None],
    )
    joined = Reference(splits=()).joined(rows).to_pylist()
    found = [(row["request_id"], row["text"], row["reference_nats"], row["reference_tokens"]) for row in joined]
    assert found == [("a", None, 1.0, 10), ("b", None, 2.0, 20), (None, "a text", None, None)]


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (["a"], "no loss of 1 requests or more, such as 'b'"),
        (["a", "b", "a"], "1 requests more than once, such as 'a'"),
    ],
)
def test_missing_and_doubled_losses_are_refused(ids: list[str], says: str) -> None:
    rows = union_rows(request_id=["a", "b", *ids], input=["ask", "ask", *([None] * len(ids))])
    with pytest.raises(InputError, match=f"--reference: has {says}"):
        Reference(splits=()).joined(rows)


@pytest.fixture
def training(models: dict[str, str], filled_store: Path, tmp_path: Path) -> dict[str, Any]:
    """Flags of a run with a preference, but for --reference."""
    rows = [{**row, "rejected": "bad"} for row in requests()]
    asked = {"requests": write(str(tmp_path / "r.parquet"), rows), "store": str(filled_store), "llm": models["llama"]}
    return {**SETTINGS, **asked, **folders(tmp_path), **PREFERENCE, "dry_run": True}


def new_reference(folder: Path, llm: str, changed: dict[str, Any] | None = None) -> str:
    """What `train` reads of an evaluation before it starts."""
    settings = {
        "llm": {"name": llm, "fingerprint": resolve(llm, flag="").fingerprint},
        "prompt": {"prompt_format": "plain", "system": "", "template_argument": [], "template_date": ""},
        "personas": ["bare"],
        "max_input_tokens": 32,
        "max_target_tokens": 256,
        "llm_quantization": "none",
        "retrieve": 0,
    }
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"settings": settings | (changed or {})}))
    row = {"request_id": "r", "user_id": "u", "persona": "bare", "nats": 1.0, "tokens": 1}
    write(str(folder / "losses.parquet"), [{**row, "rejected_nats": 1.0, "rejected_tokens": 1}])
    return str(folder)


def test_a_reference_of_this_llm_is_accepted(refuse: Job, training: dict[str, Any], tmp_path: Path) -> None:
    reference = new_reference(tmp_path / "reference", training["llm"])
    assert refuse(train, **training, reference=reference).code == 0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"llm": {"name": "other", "fingerprint": "0"}}, "was measured with the LLM 'other'"),
        ({"personas": ["own", "none"]}, "has the losses of own, none, not of bare"),
        ({"max_input_tokens": 31}, "max_input_tokens was 31 and is 32"),
        ({"retrieve": 2}, "retrieve was 2 and is 0"),
        ({"user_profile": "likelihood"}, "user_profile was 'likelihood' and is None"),
        ({"prompt": 3}, "metrics.json is not from jobs.evaluate"),
    ],
)
def test_a_reference_of_another_measurement_is_refused(
    refuse: Job, training: dict[str, Any], tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    reference = new_reference(tmp_path / "reference", training["llm"], changed)
    done = refuse(train, **training, reference=reference)
    assert (done.code, says in done.said) == (2, True), done.said
    assert "--reference" in done.said


def test_a_reference_with_texts_of_longer_histories_is_refused(
    refuse: Job, training: dict[str, Any], tmp_path: Path
) -> None:
    retrieval = {"retrieve": 2, "retriever": "bm25", "retrieve_tokens": 12}
    reference = new_reference(tmp_path / "reference", training["llm"], {**retrieval, "max_behaviors": 3})
    texts = {**retrieval, "texts": write(str(tmp_path / "texts.parquet"), behaviors())}
    done = refuse(train, **training, **texts, reference=reference)
    assert (done.code, "max_behaviors was 3 and is 512" in done.said) == (2, True), done.said
    assert refuse(train, **training, **texts, max_behaviors=3, reference=reference).code == 0


def test_a_reference_without_rejected_texts_is_refused(refuse: Job, training: dict[str, Any], tmp_path: Path) -> None:
    reference = new_reference(tmp_path / "reference", training["llm"])
    losses = pq.read_table(join(reference, "losses.parquet"))
    pq.write_table(losses.drop_columns(["rejected_nats", "rejected_tokens"]), join(reference, "losses.parquet"))
    done = refuse(train, **training, reference=reference)
    assert (done.code, "losses.parquet has no rejected_nats, rejected_tokens" in done.said) == (2, True)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"preference": 0.1}, "--preference 0.1 needs --rejected"),
        ({"preference": 0.1, "rejected": "target"}, "--preference 0.1 needs --reference"),
        ({"rejected": "target"}, "--rejected target has no effect without --preference"),
        ({"nll_weight": 0.5}, "--nll-weight 0.5 has no effect without --preference"),
        ({"preference": -1}, "--preference -1.0: must be 0 or more"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    refuse: Job, training: dict[str, Any], flags: dict[str, Any], says: str
) -> None:
    plain = {name: value for name, value in training.items() if name not in PREFERENCE}
    done = refuse(train, **{**plain, **flags})
    assert (done.code, says in done.said) == (2, True), done.said


def test_answers_that_are_not_there_are_not_paired(refuse: Job, store: Path, tmp_path: Path) -> None:
    asked = write(str(tmp_path / "r.jsonl"), requests(1))
    done = refuse(pair, requests=asked, store=str(store), out=str(tmp_path / "out"))
    assert (done.code, "--variant bare: the store has no such answers (it has none)" in done.said) == (2, True)
    assert not (tmp_path / "out").exists()


def test_requests_without_an_answer_are_not_paired(do: Job, store: Path, plug: str, tmp_path: Path) -> None:
    asked = write(str(tmp_path / "some.jsonl"), requests(2))
    answers = {"persona": "bare", "beams": 1, "max_new_tokens": 3, "precision": "fp32"}
    assert do(generate, requests=asked, store=str(store), plug=plug, **answers).code == 0
    more = write(str(tmp_path / "more.jsonl"), requests(3))
    done = do(pair, requests=more, store=str(store), out=str(tmp_path / "out"))
    assert (done.code, "the variant 'bare' has no answer to 'r2-" in done.said) == (2, True), done.said
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
