"""`evaluate` on a real Ray: its numbers against a plain calculation over single requests."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import evaluate, generate
from persona import models, plug_folder
from persona.llm import FrozenLLM
from persona.storage import read_bytes
from persona.store import Store
from tests.jobs.conftest import BUCKETS, Job, Row, requests, write

PERSONAS = ("own", "none", "other")


@pytest.fixture
def flags(store: Path, plug: str, tmp_path: Path) -> dict[str, Any]:
    source = write(str(tmp_path / "requests.jsonl"), requests(4, 2))
    return {"requests": source, "store": str(store), "plug": plug, "actors": 1, "precision": "fp32"}


def answer(do: Job, flags: dict[str, Any], *personas: str) -> None:
    assert do(generate, **flags, persona=personas, beams=1, max_new_tokens=8).code == 0


@torch.inference_mode()
def loss_by_hand(uri: str, plug: str, asked: list[Row], *, own: bool) -> tuple[list[float], list[int]]:
    """Nats and tokens of each target: the soft tokens and the text in one row, log-softmax token by token."""
    folder = Path(plug)
    record = plug_folder.read_record(folder)
    encoder, llm_folder = (models.resolve(card["name"], flag="") for card in (record.encoder, record.llm))
    llm = FrozenLLM.load(llm_folder, precision="fp32")
    model = plug_folder.load(folder, encoder=encoder, llm=llm)
    nats, tokens = [], []
    for row in asked:
        history = b"".join(seen(uri, row, record.max_behaviors)) if own else b""
        batch = model.collate([{**row, "query": row["input"], "history": history}], with_targets=True)
        soft_SD = model.soft_tokens(batch)[0]
        text, target = batch.inputs[0], batch.targets[0]
        embeds_LD = torch.cat([soft_SD, llm.embed(torch.tensor([*text, *target]))])
        logits_LV = llm.model(inputs_embeds=embeds_LD[None]).logits[0]
        start = len(embeds_LD) - len(target)
        logs = [logits_LV[start - 1 + i].double().log_softmax(-1)[token] for i, token in enumerate(target)]
        nats.append(-float(sum(logs)))
        tokens.append(len(target))
    return nats, tokens


def seen(uri: str, row: Row, most: int) -> list[bytes]:
    """The vectors that a request may see, by a loop over the whole store."""
    store = Store.open(uri)
    rows = [one for bucket in range(BUCKETS) for one in store.read_histories(bucket).to_pylist()]
    mine = [one for one in rows if one["user_id"] == row["user_id"] and one["timestamp"] < row["as_of"]]
    return [one["vector"] for one in sorted(mine, key=lambda one: one["timestamp"])][-most:]


def test_losses_are_those_of_a_calculation_by_hand(do: Job, flags: dict[str, Any], plug: str, s3: str) -> None:
    answer(do, flags, *PERSONAS)
    done = do(evaluate, **flags, out=f"{s3}/report", batch_size=3)
    assert done.code == 0
    metrics = json.loads(read_bytes(f"{s3}/report/metrics.json"))
    asked = requests(4, 2)
    for persona in ("own", "none"):
        nats, tokens = loss_by_hand(flags["store"], plug, asked, own=persona == "own")
        # metrics.json keeps 5 decimals.
        assert metrics["loss"][persona]["mean"] == pytest.approx(sum(nats) / sum(tokens), abs=2e-5)
    loss, saved = metrics["loss"], metrics["loss_saved_by_own"]
    assert saved["none"]["mean"] == pytest.approx(loss["none"]["mean"] - loss["own"]["mean"], abs=2e-5)
    for interval in [*loss.values(), *saved.values()]:
        assert interval["low"] < interval["mean"] < interval["high"]
    assert (metrics["requests"], metrics["users"], metrics["limited"]) == (8, 4, False)
    assert set(metrics["scores"]) == set(PERSONAS)
    assert set(metrics["score_gained_by_own"]["rouge1"]) == {"none", "other"}
    assert len({example["request_id"] for example in metrics["examples"]}) == 6
    assert all({*PERSONAS, "target", "input"} <= set(example) for example in metrics["examples"])
    assert metrics["settings"]["plug_fingerprint"] == plug_folder.fingerprint(Path(plug))
    assert done.result["loss"] == loss


def test_a_task_is_scored_by_its_own_metric(do: Job, flags: dict[str, Any], tmp_path: Path) -> None:
    """Answers put into the table by hand, so that the scores can be, too."""
    asked = [{**row, "target": str(1 + i % 5)} for i, row in enumerate(requests(4, 2))]
    write(flags["requests"], asked)
    answer(do, flags, "own", "none")
    store = Store.open(flags["store"])
    rows = store.read_generations().drop_columns(["created_at"])
    target = {row["request_id"]: int(row["target"]) for row in asked}
    off = {"own": 0, "none": 1}
    given = [
        str(min(target[r] + off[v], 5))
        for r, v in zip(rows["request_id"].to_pylist(), rows["variant"].to_pylist(), strict=True)
    ]
    store.write_generations(rows.set_column(rows.column_names.index("output"), "output", [given]))
    done = do(evaluate, **flags, out=str(tmp_path / "out"), task="LaMP_3", personas=("own",), variants=("own", "none"))
    wrong = sum(value < 5 for value in target.values()) / len(target)
    assert done.result["scores"]["own"] == {"mae": 0, "rmse": 0}
    assert done.result["scores"]["none"] == {"mae": pytest.approx(wrong), "rmse": pytest.approx(math.sqrt(wrong))}
    assert done.result["score_gained_by_own"]["mae"]["none"]["mean"] == pytest.approx(wrong, abs=1e-5)


def test_missing_answers_are_refused_and_a_variant_without_any_is_named(
    do: Job, flags: dict[str, Any], tmp_path: Path
) -> None:
    answer(do, flags, "own")
    flags["out"] = str(tmp_path / "out")
    done = do(evaluate, **flags, personas=("own",))
    assert done.result["unanswered_variants"] == ["none", "other"]
    write(flags["requests"], requests(4, 3))
    refused = do(evaluate, **flags, personas=("own",))
    assert refused.code == 2
    assert "the variant 'own' has no answer to 'r" in refused.said
    assert "jobs.generate" in refused.said
    assert do(evaluate, **flags, personas=("own",), variants=("none",)).code == 0
