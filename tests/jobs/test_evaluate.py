"""Tests for `evaluate` on a real Ray: its numbers against a plain calculation over single requests."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import evaluate
from jobs.runtime import losses
from persona.inputs.histories import bucket_of
from persona.models import resolve as models
from persona.models.frozen_llm import FrozenLLM
from persona.options import PersonaKind
from persona.plug import folder as plug_folder, record as plug_record
from persona.plug.inspection import PlugAlone
from persona.storage import read_bytes
from persona.store.store import Store
from tests import lamp_form
from tests.jobs.conftest import BUCKETS, Job, Row, behaviors, requests, seen, write
from tests.stores import write_rows

PERSONAS = ("own", "none", "other")


@pytest.fixture
def flags(store: Path, plug: str, tmp_path: Path) -> dict[str, Any]:
    source = write(str(tmp_path / "requests.jsonl"), requests(4, 2))
    return {"requests": source, "store": str(store), "plug": plug, "actors": 1, "precision": "fp32"}


def answer(
    flags: dict[str, Any],
    rows: list[Row],
    *,
    by: str | None = None,
    change: str = "new",
    **answers: Callable[[Row], str],
) -> None:
    """Writes answers of the plug (or `by` another one) to the table; each variant is given by a function."""
    answered = [
        {
            "request_id": row["request_id"],
            "user_id": row["user_id"],
            "output": output(row),
            "variant": variant,
            "plug": by or plug_record.fingerprint(Path(flags["plug"])),
            "llm": "l",
            "n_behaviors": 1,
            "n_tokens": 1,
            "finish_reason": "stop",
            "fingerprint": "f",
            "bucket": int(bucket_of([row["user_id"]], BUCKETS)[0]),
            "change": change,
        }
        for variant, output in answers.items()
        for row in rows
    ]
    write_rows(Store.open(flags["store"]), "generations", pa.Table.from_pylist(answered))


@torch.inference_mode()
def loss_by_hand(uri: str, plug: str, rows: list[Row], *, own: bool) -> tuple[list[float], list[int]]:
    """Nats and tokens of each target: the soft tokens and the text in one row, log-softmax token by token."""
    folder = Path(plug)
    record = plug_record.read(folder)
    encoder, llm_folder = (models.resolve(card["name"], flag="") for card in (record.encoder, record.llm))
    llm = FrozenLLM.load(llm_folder, precision="fp32")
    model = plug_folder.load(folder, encoder=encoder, llm=llm)
    nats, tokens = [], []
    for row in rows:
        history = b"".join(seen(uri, row, record.max_behaviors)) if own else b""
        batch = model.collate([{**row, "query": row["input"], "history": history}])
        soft_SD = model.soft_tokens(batch)[0]
        prompt, target = batch.prompts[0], batch.targets[0]
        before_FD = llm.embed(torch.tensor(prompt.before, dtype=torch.long))
        embeds_LD = torch.cat([before_FD, soft_SD, llm.embed(torch.tensor([*prompt.after, *target]))])
        logits_LV = llm.model(inputs_embeds=embeds_LD[None]).logits[0]
        start = len(embeds_LD) - len(target)
        logs = [logits_LV[start - 1 + i].double().log_softmax(-1)[token] for i, token in enumerate(target)]
        nats.append(-float(sum(logs)))
        tokens.append(len(target))
    return nats, tokens


def test_losses_are_those_of_a_calculation_by_hand(do: Job, flags: dict[str, Any], plug: str, s3: str) -> None:
    rows = requests(4, 2)
    answer(flags, rows, own=lambda row: row["target"], none=lambda row: "no", other=lambda row: "of 1")
    done = do(evaluate, **flags, out=f"{s3}/report", batch_size=3)
    assert done.code == 0
    metrics = json.loads(read_bytes(f"{s3}/report/metrics.json"))
    for persona in ("own", "none"):
        nats, tokens = loss_by_hand(flags["store"], plug, rows, own=persona == "own")
        # metrics.json keeps 5 decimals.
        assert metrics["loss"][persona]["mean"] == pytest.approx(sum(nats) / sum(tokens), abs=2e-5)
    loss, saved = metrics["loss"], metrics["loss_saved_by_own"]
    assert saved["none"]["mean"] == pytest.approx(loss["none"]["mean"] - loss["own"]["mean"], abs=2e-5)
    for interval in [*loss.values(), *saved.values()]:
        assert interval["low"] < interval["mean"] < interval["high"]
    assert (metrics["requests"], metrics["users"], metrics["limited"]) == (8, 4, False)
    assert set(metrics["scores"]) == set(PERSONAS)
    assert metrics["scores"]["own"]["rouge1_mean"] == 1
    assert set(metrics["score_gained_by_own"]["rouge1"]) == {"none", "other"}
    assert len({example["request_id"] for example in metrics["examples"]}) == 6
    assert all({*PERSONAS, "target", "input"} <= set(example) for example in metrics["examples"])
    assert metrics["settings"]["plug_fingerprint"] == plug_record.fingerprint(Path(plug))
    assert done.result["loss"] == loss


def test_rejected_texts_are_measured_like_targets_and_all_numbers_are_saved(
    do: Job, flags: dict[str, Any], plug: str, s3: str, tmp_path: Path
) -> None:
    rows = [{**row, "worse": row["target"][::-1]} for row in requests(4, 2)]
    write(flags["requests"], rows)
    personas = ("own", "none", "mean")
    done = do(evaluate, **flags, out=f"{s3}/ranked", persona=personas, rejected="worse")
    assert done.code == 0
    saved = pq.read_table(pa.BufferReader(read_bytes(f"{s3}/ranked/losses.parquet")))
    assert saved.column_names == [
        *("request_id", "user_id", "persona", "n_behaviors", "nats", "tokens", "rejected_nats", "rejected_tokens")
    ]
    assert saved.num_rows == len(rows) * len(personas)
    found = {(row["persona"], row["request_id"]): row for row in saved.to_pylist()}
    for persona in ("own", "none"):
        own = persona == "own"
        nats, tokens = loss_by_hand(flags["store"], plug, rows, own=own)
        rejected, _ = loss_by_hand(flags["store"], plug, [{**row, "target": row["worse"]} for row in rows], own=own)
        mine = [found[persona, row["request_id"]] for row in rows]
        # float32 sums of about 50 nats in another order.
        assert [row["nats"] for row in mine] == pytest.approx(nats, abs=1e-3)
        assert [row["tokens"] for row in mine] == tokens
        assert [row["rejected_nats"] for row in mine] == pytest.approx(rejected, abs=1e-3)
        likelier = np.mean([row["nats"] < row["rejected_nats"] for row in mine])
        assert done.result["ranking"][persona]["likelier"]["mean"] == pytest.approx(likelier)
    assert "ranking, mean" in done.table and "by gain over none" in done.table


def test_a_task_is_scored_by_its_official_metric(do: Job, flags: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "target": str(1 + i % 5)} for i, row in enumerate(requests(4, 2))]
    write(flags["requests"], rows)
    answer(flags, rows, own=lambda row: row["target"], none=lambda row: str(min(int(row["target"]) + 1, 5)))
    out = tmp_path / "out"
    done = do(evaluate, **flags, out=str(out), task="LaMP_3", persona=("own",), variant=("own", "none"))
    wrong = sum(row["target"] != "5" for row in rows) / len(rows)
    assert done.result["scores"]["own"] == {"mae": 0, "rmse": 0}
    assert done.result["scores"]["none"] == {"mae": pytest.approx(wrong), "rmse": pytest.approx(math.sqrt(wrong))}
    assert done.result["score_gained_by_own"]["mae"]["none"]["mean"] == pytest.approx(wrong, abs=1e-5)
    golds = {row["request_id"]: row["target"] for row in rows}
    assert lamp_form.read((out / "lamp" / "golds.json").read_bytes(), "LaMP_3") == golds
    assert lamp_form.read((out / "lamp" / "own.json").read_bytes(), "LaMP_3") == golds
    others = lamp_form.read((out / "lamp" / "none.json").read_bytes(), "LaMP_3")
    assert others.keys() == golds.keys() and others != golds


def test_missing_answers_are_refused_and_variants_without_any_are_listed(
    do: Job, flags: dict[str, Any], tmp_path: Path
) -> None:
    flags |= {"out": str(tmp_path / "out"), "persona": ("own",), "variant": ("own", "none", "other")}
    answer(flags, requests(4, 1), own=lambda row: "yes")
    refused = do(evaluate, **flags)
    assert refused.code == 2
    assert "the variant 'own' has no answer to 'r" in refused.said
    assert "jobs.generate" in refused.said and "--losses-only" in refused.said
    without = do(evaluate, **{**flags, "variant": (), "losses_only": True})
    assert (without.code, without.result["scores"], without.result["unanswered_variants"]) == (0, {}, [])
    assert without.result["loss"]["own"]["mean"] > 0
    answer(flags, requests(4, 2), own=lambda row: "yes")
    done = do(evaluate, **flags)
    assert done.result["unanswered_variants"] == ["none", "other"]
    assert set(done.result["scores"]) == {"own"}


def test_answers_of_another_plug_are_refused(do: Job, flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"out": str(tmp_path / "out"), "persona": ("own",)}
    answer(flags, requests(4, 2), by="abc", own=lambda row: "yes")
    refused = do(evaluate, **flags)
    mine = plug_record.fingerprint(Path(flags["plug"]))
    assert refused.code == 2
    assert f"of another plug (abc, and --plug is {mine})" in refused.said and "jobs.generate" in refused.said
    assert not (tmp_path / "out").exists()
    assert do(evaluate, **flags, losses_only=True).code == 0


def test_answers_that_are_replaced_during_the_run_are_not_scored(
    do: Job, flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, before = requests(4, 2), Store.open(flags["store"]).version("generations")
    answer(flags, rows, own=lambda row: row["target"])
    measure = losses.measure

    def replace_answers(*arguments: Any, **more: Any) -> losses.Losses:
        measured = measure(*arguments, **more)
        answer(flags, rows, by="abc", change="edited", own=lambda row: "something else")
        return measured

    monkeypatch.setattr(losses, "measure", replace_answers)
    done = do(evaluate, **flags, out=str(tmp_path / "out"), persona=("own",), metric="text")
    assert done.result["scores"]["own"]["rouge1"] == 1
    now = Store.open(flags["store"]).version("generations")
    assert before < done.result["settings"]["generations_version"] < now


def test_the_report_shows_past_texts_and_a_map_of_all_users(
    do: Job, flags: dict[str, Any], plug: str, tmp_path: Path
) -> None:
    rows, written = requests(4, 2), behaviors()
    # This text has changed since it was encoded, so the report must not show it as what the plug read.
    written[0] = {**written[0], "text": "something else"}
    answer(flags, rows, own=lambda row: "<script>", none=lambda row: "no")
    texts = write(str(tmp_path / "histories.parquet"), written)
    done = do(evaluate, **flags, out=str(tmp_path / "out"), texts=texts, variant=("own", "none"))
    assert done.code == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_bytes())
    assert {one["user_id"] for one in metrics["map"]} == {f"user-{user}" for user in range(4)}
    text_of = {(one["user_id"], one["behavior_id"]): one["text"] for one in behaviors()}
    shown = [*metrics["examples"], *metrics["largest_gains"], *metrics["largest_losses"]]
    for one in shown:
        # A request sees the last three behaviors before it.
        assert len(one["listened_to"]) == min(one["n_behaviors"], 3)
        assert sum(behavior["weight"] for behavior in one["listened_to"]) == pytest.approx(1, abs=1e-4)
        for behavior in one["listened_to"]:
            changed = (one["user_id"], behavior["behavior_id"]) == ("user-0", "b0")
            assert behavior["text"] == (None if changed else text_of[one["user_id"], behavior["behavior_id"]])
    assert metrics["largest_gains"][0]["nats_a_token"]["other"] > metrics["largest_gains"][0]["nats_a_token"]["own"]
    page = (tmp_path / "out" / "report.html").read_text()
    heard = [one["text"] for gain in metrics["largest_gains"] for one in gain["listened_to"] if one["text"]]
    assert heard and all(text in page for text in heard)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert {"gain.png", "map.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_weights_of_the_report_are_those_of_the_plug(flags: dict[str, Any], plug: str) -> None:
    folder, row = Path(plug), {**requests(1, 4)[3], "query": "title of paper 3"}
    record = plug_record.read(folder)
    encoder = models.resolve(record.encoder["name"], flag="")
    vectors = seen(flags["store"], row, record.max_behaviors)
    found = PlugAlone.load(folder, encoder).look([{**row, "history": b"".join(vectors)}])[0]
    plug_alone = plug_folder.load_plug(folder, encoder=encoder)
    text = plug_folder.new_query_text(encoder, record.query_prompt, record.max_query_tokens)
    with torch.inference_mode():
        query_d = plug_alone.encode_query(*text.tokens([row["query"]], torch.device("cpu")))[0].double()
    history_Nd = torch.tensor(np.frombuffer(b"".join(vectors), "<f2").reshape(len(vectors), -1).astype("f8"))
    expected = (history_Nd @ query_d * record.options.temperature).softmax(0)
    assert found.weights == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.persona.shape == (record.options.persona_tokens * record.llm_width,)


def test_columns_without_texts_are_refused(refuse: Job, flags: dict[str, Any], tmp_path: Path) -> None:
    done = refuse(evaluate, **flags, out=str(tmp_path / "out"), columns="text=body")
    assert (done.code, "--texts" in done.said) == (2, True)


def test_losses_with_retrieved_texts_are_those_of_the_plug_itself(
    do: Job, flags: dict[str, Any], plug: str, tmp_path: Path
) -> None:
    rows, written = requests(4, 2), behaviors()
    texts = write(str(tmp_path / "histories.jsonl"), written)
    retrieval = {"texts": texts, "retrieve": 1, "retriever": "recency", "retrieve_tokens": 16}
    done = do(evaluate, **flags, out=str(tmp_path / "out"), persona=("own", "bare"), **retrieval)
    assert done.code == 0
    assert done.result["unanswered_variants"] == ["own-recency-1", "bare-recency-1"], (
        "the default names that generate uses"
    )
    folder = Path(plug)
    record = plug_record.read(folder)
    encoder, llm_folder = (models.resolve(card["name"], flag="") for card in (record.encoder, record.llm))
    frozen = FrozenLLM.load(llm_folder, precision="fp32")
    model = plug_folder.load(folder, encoder=encoder, llm=frozen, retrieved_tokens=16)
    for persona in ("own", "bare"):
        nats = tokens = 0.0
        for row in rows:
            vectors = seen(flags["store"], row, record.max_behaviors)
            latest = [one["text"] for one in written if one["user_id"] == row["user_id"]][len(vectors) - 1]
            one = {**row, "query": row["input"], "history": b"".join(vectors), "retrieved": [latest]}
            batch = model.collate([one], persona=PersonaKind(persona))
            with torch.inference_mode():
                nats += model(batch).item()
            tokens += batch.n_target_tokens
        assert done.result["loss"][persona]["mean"] == pytest.approx(nats / tokens, abs=2e-5)
