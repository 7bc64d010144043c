"""jobs.train on a real Ray: the plug is the same with one worker or two, killed or not; no request sees its future."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from jobs import generate, train
from jobs.runtime.configuration import read_config
from jobs.runtime.training import inputs as train_data
from persona.api import load_plug
from persona.engines.local import LocalEngine
from persona.errors import UsageError
from persona.models.frozen_llm import FrozenLLM
from persona.models.quantized import QuantizedLinear
from persona.models.resolve import resolve
from persona.options import Decoding, PromptOptions
from persona.plug import folder as plug_folder, record as plug_record
from persona.plug.answerer import Answerer
from persona.storage import join, list_files, local_folder
from persona.store.store import Store
from tests.jobs.conftest import (
    START,
    TRAINING,
    Job,
    arguments,
    behaviors,
    fill_store,
    n_reports,
    requests,
    seen,
    stored,
    write,
)
from tests.jobs.test_tracking import scalars

# 24 requests in batches of 4 are 6 steps an epoch.
STEPS = 12
SETTINGS: dict[str, Any] = {**TRAINING, "validation_rows": 8}


@pytest.fixture(scope="module")
def inputs(models: dict[str, str], filled_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Requests, store and LLM of all runs."""
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "requests": write(str(folder / "train.parquet"), requests()),
        "validation": write(str(folder / "validation.jsonl"), requests(3)),
        "store": str(filled_store),
        "llm": models["llama"],
    }


def folders(root: Any) -> dict[str, str]:
    return {"runs": join(str(root), "runs"), "plug": join(str(root), "plug")}


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run with one worker."""
    root = tmp_path_factory.mktemp("undisturbed")
    train.main(read_config(train.Config, arguments(**SETTINGS, **inputs, **folders(root))))
    return root


def record(plug: Any) -> dict[str, Any]:
    with local_folder(str(plug)) as folder:
        return json.loads((folder / "plug.json").read_text())


def curve(plug: Any, kind: str = "training") -> np.ndarray:
    """(steps, 2): the step and its loss."""
    return np.array(record(plug)["training"][f"{kind}_curve"])


def weights(plug: Any) -> dict[str, np.ndarray]:
    with local_folder(str(plug)) as folder:
        return load_file(folder / "plug.safetensors")


def test_the_plug_folder_is_complete_and_names_its_models(undisturbed: Path, models: dict[str, str]) -> None:
    found = record(undisturbed / "plug")
    assert sorted(path.name for path in (undisturbed / "plug").iterdir()) == [
        "README.md",
        "plug.json",
        "plug.safetensors",
    ]
    assert found["llm"]["name"] == models["llama"]
    assert found["encoder"]["name"] == models["encoder"]
    training = found["training"]
    assert [step for step, _ in training["training_curve"]] == list(range(1, STEPS + 1))
    for curve in ("validation_curve", "none_curve"):
        assert [step for step, _ in training[curve]] == list(range(STEPS + 1))
    assert all(
        own != none for (_, own), (_, none) in zip(training["validation_curve"], training["none_curve"], strict=True)
    )
    assert training["validation_loss"] == pytest.approx(min(loss for _, loss in training["validation_curve"]), abs=1e-5)
    assert training["validation_curve"][0][1] > training["validation_loss"], "it has learned nothing"
    card = (undisturbed / "plug" / "README.md").read_text()
    assert models["llama"] in card
    assert "learning_rate" in card
    held_out = training["held_out"]
    assert (held_out["requests"], held_out["users"]) == (8, 3)
    assert held_out["loss"]["own"]["mean"] == pytest.approx(training["validation_loss"], abs=2e-5)
    assert held_out["loss"]["none"]["mean"] == dict(training["none_curve"])[training["selected_step"]]
    assert held_out["loss"]["other"]["mean"] != held_out["loss"]["own"]["mean"]
    assert f"| other | {held_out['loss']['other']['mean']:.4f} [" in card
    assert bool(held_out["warning"]) == (held_out["loss_saved_by_own"]["other"]["low"] <= 0)
    assert ("**Warning:** own is" in card) == bool(held_out["warning"])
    assert f"{training['validation_loss']:.4f}" in card


def test_two_workers_train_the_same_plug_as_one(do: Job, inputs: dict, undisturbed: Path, tmp_path: Path) -> None:
    done = do(train, **SETTINGS, **inputs, **folders(tmp_path), workers=2, zero_stage=3)
    assert done.code == 0
    one, two = undisturbed / "plug", tmp_path / "plug"
    # Losses are rounded to 5 decimals; the order of float32 sums may change the last one.
    np.testing.assert_allclose(curve(two), curve(one), rtol=0, atol=2e-5)
    np.testing.assert_allclose(curve(two, "validation"), curve(one, "validation"), rtol=0, atol=2e-5)
    expected = weights(one)
    held_out = [record(plug)["training"]["held_out"]["loss"] for plug in (one, two)]
    for persona in ("own", "none", "other"):
        assert held_out[1][persona]["mean"] == pytest.approx(held_out[0][persona]["mean"], abs=2e-5)
    for name, value in weights(two).items():
        # A key's bias has no gradient except rounding errors, which AdamW scales up to the learning rate; here they are
        # below 2e-6.
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-4, err_msg=name)


def train_worker_pid() -> int | None:
    """The id of a process of the local Ray that is training now."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::RayTrain"):
                return process.pid
    return None


@contextmanager
def killing_a_worker(runs: Path, n_checkpoints: int) -> Iterator[list[int]]:
    """Kills a training worker once the run has `n_checkpoints` new checkpoints; yields the ids of killed processes."""
    killed: list[int] = []
    ended = threading.Event()
    enough = n_reports(runs) + n_checkpoints

    def watch() -> None:
        while not ended.wait(0.01):
            if n_reports(runs) >= enough and (worker := train_worker_pid()) is not None:
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        ended.set()
        watcher.join()


def test_a_run_with_killed_workers_trains_the_same_plug_and_is_tracked_as_one(
    do: Job, inputs: dict, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import TrainingFailedError

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    flags = {**SETTINGS, **inputs, **folders(tmp_path), "track": "tensorboard"}
    with killing_a_worker(tmp_path / "runs", 2) as killed, pytest.raises(TrainingFailedError):
        do(train, **flags, max_failures=0)
    assert killed
    # A marker in the curve proves that the run resumed here and did not start again.
    for file in (tmp_path / "runs").glob("r/checkpoint_*/state.json"):
        state = json.loads(file.read_text())
        assert 1 <= state["step"] < STEPS - 2
        state["training_curve"][0] = [1, 1234.5]
        file.write_text(json.dumps(state))

    with killing_a_worker(tmp_path / "runs", 1) as killed:
        done = do(train, **flags, max_failures=1)
    assert killed
    assert (done.code, done.result["steps"]) == (0, STEPS)
    found, expected = curve(tmp_path / "plug"), curve(undisturbed / "plug")
    assert found[0].tolist() == [1, 1234.5]
    assert found[1:].tolist() == expected[1:].tolist()
    same = weights(undisturbed / "plug")
    for name, value in weights(tmp_path / "plug").items():
        np.testing.assert_array_equal(value, same[name], err_msg=name)
    (tracked,) = (tmp_path / "board").iterdir()  # both commands, and the crash, are one run
    logged = scalars(tracked, "train/loss")
    assert sorted(step for step, _ in logged) == list(range(1, STEPS + 1))
    assert dict(logged) == pytest.approx(dict(expected.tolist()), abs=2e-5)
    assert sorted(step for step, _ in scalars(tracked, "validation/loss")) == list(range(STEPS + 1))


def test_a_run_with_alignment_and_contrast_is_resumed(do: Job, inputs: dict, undisturbed: Path, tmp_path: Path) -> None:
    flags = {**SETTINGS, **inputs, "alignment": 0.5, "contrast": 0.5, "recency": True, "persona_warmup": 5}
    assert do(train, **flags, **folders(tmp_path / "whole")).code == 0
    with killing_a_worker(tmp_path / "killed" / "runs", 2) as killed:
        assert do(train, **flags, **folders(tmp_path / "killed"), max_failures=1).code == 0
    assert killed
    found, expected = tmp_path / "killed" / "plug", tmp_path / "whole" / "plug"
    assert curve(found).tolist() == curve(expected).tolist()
    assert curve(expected)[0].tolist() != curve(undisturbed / "plug")[0].tolist()
    same = weights(expected)
    for name, value in weights(found).items():
        np.testing.assert_array_equal(value, same[name], err_msg=name)
    assert same["recency_slope"].tolist() != [0.0]
    assert record(expected)["options"]["recency"] is True


def test_prompt_tuning_trains_and_validates_without_histories(
    do: Job, inputs: dict, models: dict[str, str], tmp_path: Path
) -> None:
    held_out = requests(2)
    flags = {**SETTINGS, **inputs, **folders(tmp_path), "validation": write(str(tmp_path / "held.jsonl"), held_out)}
    done = do(train, **{**flags, "epochs": 1, "weights": "mean", "empty_history": 1})
    assert done.code == 0
    encoder, llm = (resolve(models[name], flag="") for name in ("encoder", "llama"))
    frozen = FrozenLLM.load(llm, precision="fp32", max_input_tokens=SETTINGS["max_input_tokens"])
    model = plug_folder.load(tmp_path / "plug", encoder=encoder, llm=frozen)
    batch = model.collate([{**row, "history": b""} for row in held_out])
    with torch.inference_mode():
        loss = model(batch).sum().item() / batch.n_target_tokens
    # The summary has 5 decimals; the run sums the same float32 numbers in batches of two.
    assert done.result["validation_loss"] == pytest.approx(loss, abs=2e-5)
    assert curve(tmp_path / "plug", "validation")[-1, 1] < curve(tmp_path / "plug", "validation")[0, 1]


def test_retrieved_texts_and_system_texts_are_in_the_chats(
    do: Job, refuse: Job, inputs: dict, models: dict[str, str], store: Path, tmp_path: Path
) -> None:
    written = behaviors()
    held_out = [{**row, "system": None if number % 3 else f"title {number}"} for number, row in enumerate(requests(2))]
    flags = {**SETTINGS, **inputs, **folders(tmp_path), "validation": write(str(tmp_path / "held.jsonl"), held_out)}
    flags |= {"epochs": 1, "weights": "mean", "texts": write(str(tmp_path / "histories.jsonl"), written)}
    retrieval = {"retrieve": 1, "retriever": "recency", "retrieve_tokens": 12}
    flags |= {"llm": models["chat"], "system": "Write.", "soft_position": "start", **retrieval}
    done = do(train, **flags)
    assert done.code == 0
    # Six users with four requests each, which see one to four behaviors.
    assert "60 of 60 visible behaviors found in --texts" in done.table
    training = record(tmp_path / "plug")["training"]
    assert [training[name] for name in ("retrieve", "retriever", "retrieve_tokens")] == [1, "recency", 12]
    card = (tmp_path / "plug" / "README.md").read_text()
    assert (
        "<s>[2 soft tokens]<|system|>\nWrite.</s>\n<|user|>\n[past text]\n[input]</s>\n<|assistant|>\n[target]</s>"
        in card
    )
    prompt = PromptOptions(prompt_format="chat", system="Write.", soft_position="start")
    encoder, llm = (resolve(models[name], flag="") for name in ("encoder", "chat"))
    frozen = FrozenLLM.load(llm, precision="fp32", max_input_tokens=SETTINGS["max_input_tokens"], prompt=prompt)
    model = plug_folder.load(tmp_path / "plug", encoder=encoder, llm=frozen, retrieved_tokens=12)
    rows = []
    for row in held_out:
        vectors = seen(inputs["store"], row, 512)
        texts = [one["text"] for one in written if one["user_id"] == row["user_id"]]
        rows.append(
            {
                **row,
                "query": row["input"],
                "history": b"".join(vectors),
                "retrieved": texts[len(vectors) - 1 : len(vectors)],
            }
        )
    batch = model.collate(rows)
    with torch.inference_mode():
        loss = model(batch).sum().item() / batch.n_target_tokens
    assert done.result["validation_loss"] == pytest.approx(loss, abs=2e-5)
    decoding = {"beams": 1, "max_new_tokens": 6, "precision": "fp32"}
    done = do(
        generate,
        requests=flags["validation"],
        store=store,
        plug=flags["plug"],
        actors=1,
        texts=flags["texts"],
        **retrieval,
        **decoding,
    )
    assert done.code == 0
    answerer = Answerer(
        model.plug, LocalEngine(frozen, batch_size=1), model.query_text, batch_size=1, retrieved_tokens=12
    )
    answers = answerer.answer(rows, Decoding(beams=1, max_new_tokens=6))
    found = stored(store, "generations")
    assert [found[row["request_id"], "own-recency-1"]["output"] for row in rows] == [one.text for one in answers]

    other = refuse(train, **{**flags, "retriever": "bm25"})
    assert (other.code, "retriever was 'recency' and is 'bm25'" in other.said) == (2, True)
    other = refuse(train, **{**flags, "soft_position": "input"})
    assert (other.code, "soft_position was 'start' and is 'input'" in other.said) == (2, True)
    unused = refuse(train, **{**flags, "retrieve": 0, "retrieve_tokens": None})
    assert "--texts has no effect without --retrieve" in unused.said


def test_a_dry_run_shows_what_the_llm_reads(refuse: Job, inputs: dict, models: dict[str, str], tmp_path: Path) -> None:
    flags = {**SETTINGS, **inputs, **folders(tmp_path), "dry_run": True}
    plain = refuse(train, **flags)
    assert plain.result["prompt"]["prompt_format"] == "plain"
    assert plain.result["prompt_example"] == "<s>[2 soft tokens][input]\n[target]</s>"
    assert r'"<s>[2 soft tokens][input]\n[target]</s>"' in plain.table
    n_steps = SETTINGS["epochs"] * (len(requests()) // SETTINGS["global_batch"])
    assert (plain.result["requests"], plain.result["steps"]) == (len(requests()), n_steps)
    assert f"{n_steps}: {SETTINGS['epochs']} epochs in batches of {SETTINGS['global_batch']}" in plain.table
    chat = refuse(train, **{**flags, "llm": models["chat"]})
    assert chat.result["prompt"]["prompt_format"] == "chat"
    assert chat.result["prompt_example"] == "<s><|user|>\n[2 soft tokens][input]</s>\n<|assistant|>\n[target]</s>"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_format": "chat"}, "--prompt-format chat needs a chat template"),
        ({"system": "Write."}, "--system or --template-argument needs a chat template"),
        ({"prompt_format": "plain", "system": "Write."}, "--system Write. has no effect without --prompt-format chat"),
        ({"template_argument": "thinking"}, "--template-argument thinking: must be KEY=VALUE"),
        ({"template_date": "today"}, "--template-date today: must be a date like"),
    ],
)
def test_prompts_that_cannot_be_written_are_refused(
    refuse: Job, inputs: dict, tmp_path: Path, wrong: dict, message: str
) -> None:
    done = refuse(train, **SETTINGS, **inputs, **folders(tmp_path), **wrong, dry_run=True)
    assert (done.code, message in done.said) == (2, True), done.said


def test_system_texts_without_a_chat_are_refused(refuse: Job, inputs: dict, tmp_path: Path) -> None:
    source = write(str(tmp_path / "requests.jsonl"), [{**row, "system": "Write."} for row in requests()])
    done = refuse(train, **SETTINGS, **{**inputs, "requests": source}, **folders(tmp_path), dry_run=True)
    assert (done.code, "the requests have a column 'system'" in done.said) == (2, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Ray finds the GPU")
def test_compile_is_refused_before_any_work_where_ray_has_no_gpu(do: Job, inputs: dict, tmp_path: Path) -> None:
    done = do(train, **SETTINGS, **inputs, **folders(tmp_path), compile=True)
    assert (done.code, "--compile is for GPUs, and Ray has none; leave it out" in done.said) == (2, True), done.said
    assert not list(tmp_path.rglob("*"))


def test_only_compile_needs_a_gpu(inputs: dict, tmp_path: Path) -> None:
    for flags, n_gpus, is_refused in (({"compile": True}, 1, False), ({"compile": True}, 0, True), ({}, 0, False)):
        config = read_config(train.Config, arguments(**SETTINGS, **inputs, **folders(tmp_path), **flags))
        spec = train._spec(config, train._inputs(config))
        with pytest.raises(UsageError, match="--compile is for GPUs") if is_refused else nullcontext():
            spec.check_gpus(n_gpus)


def test_resuming_with_other_settings_is_refused(refuse: Job, inputs: dict, undisturbed: Path) -> None:
    flags = {**SETTINGS, **inputs, **folders(undisturbed)}
    done = refuse(train, **{**flags, "learning_rate": 2e-3, "epochs": 1})
    assert done.code == 2
    assert "epochs was 2 and is 1; learning_rate was 0.003 and is 0.002" in done.said
    assert "resume run 'r'" in refuse(train, **flags, dry_run=True).result["would"]


def test_resuming_is_refused_when_the_data_was_deleted(
    refuse: Job, inputs: dict, undisturbed: Path, store: Path
) -> None:
    flags = {**SETTINGS, **inputs, **folders(undisturbed), "store": store, "dry_run": True}
    assert "resume run 'r'" in refuse(train, **flags).result["would"]
    with Store.open(str(store)).writer("behaviors", job="test") as writer:
        writer.erase_history()
    done = refuse(train, **flags)
    assert done.code == 2
    assert "jobs.forget or jobs.store vacuum has deleted since; give the run another name" in done.said


def test_resuming_on_another_store_of_the_same_encoder_is_refused(
    refuse: Job, inputs: dict, undisturbed: Path, models: dict[str, str], tmp_path: Path
) -> None:
    other = fill_store(tmp_path / "other", models["encoder"], behaviors())
    done = refuse(train, **{**SETTINGS, **inputs, **folders(undisturbed), "store": other, "dry_run": True})
    assert (done.code, f"was started with another store than {other}; give --store" in done.said) == (2, True)


def test_an_option_newer_than_the_run_was_off_in_it(
    refuse: Job, inputs: dict, undisturbed: Path, tmp_path: Path
) -> None:
    started = json.loads((undisturbed / "runs" / "r" / "settings.json").read_text())
    for name in ("contrast", "recency", "retrieve", "texts"):
        del started["settings"][name]
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "settings.json").write_text(json.dumps(started))
    flags = {**SETTINGS, **inputs, **folders(tmp_path), "dry_run": True}
    # Without a checkpoint there is nothing to resume, and any settings are as good.
    for more in ({}, {"contrast": 0.3}):
        assert "start run 'r'" in refuse(train, **flags, **more).result["would"]
    # But a tracker keeps the settings that it was told first.
    assert "contrast was 0.0 and is 0.3" in refuse(train, **flags, contrast=0.3, track="tensorboard").said
    (tmp_path / "runs" / "r" / "checkpoint_a").mkdir()
    (tmp_path / "runs" / "r" / "checkpoint_a" / "state.json").write_text("{}")
    assert "resume run 'r'" in refuse(train, **flags).result["would"]
    assert "contrast was 0.0 and is 0.3" in refuse(train, **flags, contrast=0.3).said


def test_a_finished_run_is_published_again_without_training(
    do: Job, inputs: dict, undisturbed: Path, tmp_path: Path
) -> None:
    flags = {**SETTINGS, **inputs, **folders(undisturbed), "plug": str(tmp_path / "again")}
    done = do(train, **flags)
    assert (done.code, done.result["steps"]) == (0, STEPS)
    for file in (undisturbed / "plug").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_run_stops_early_goes_on_without_patience_and_gives_its_last_step_when_selected(
    do: Job, inputs: dict, tmp_path: Path
) -> None:
    # Training on other targets raises this held-out loss.
    held_out = [{**row, "target": "%#! " * 8} for row in requests(2)]
    flags = {**SETTINGS, **inputs, "epochs": 1, "weights": "mean", "learning_rate": 3e-2}
    flags |= {**folders(tmp_path), "validation": write(str(tmp_path / "held.jsonl"), held_out)}
    stopped = do(train, **flags, patience=2)
    best = stopped.result
    last = do(train, **{**flags, "plug": str(tmp_path / "last")}, select="last").result
    assert (best["select"], best["stopped_early"], best["planned_steps"]) == ("best", True, 6)
    assert best["steps"] == best["selected_step"] + 2 < 6
    early = f"stopped early at step {best['steps']} of 6"
    assert early in stopped.table
    assert early in (tmp_path / "plug" / "README.md").read_text()
    assert [record(tmp_path / "plug")["training"][name] for name in ("steps", "planned_steps")] == [best["steps"], 6]
    assert (last["select"], last["steps"], last["selected_step"], last["stopped_early"]) == ("last", 6, 6, False)
    losses = dict(record(tmp_path / "plug")["training"]["validation_curve"])
    assert losses.pop(0) > 0  # before the first step, of which there is no checkpoint
    assert best["selected_step"] == min(losses, key=lambda step: losses[step])
    # The personas are measured with the weights of the plug, not with those of the last step.
    for one in (best, last):
        assert one["held_out"]["loss"]["own"]["mean"] == pytest.approx(one["validation_loss"], abs=2e-5)
    [checkpoint] = [
        file.parent for file in (tmp_path / "runs").glob("r/*/state.json") if json.loads(file.read_text())["step"] == 6
    ]
    expected = load_file(checkpoint / "plug.safetensors")
    for name, value in weights(tmp_path / "last").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert "The weights are those of step 6, the last." in (tmp_path / "last" / "README.md").read_text()
    assert "the one with the lowest held-out loss" in (tmp_path / "plug" / "README.md").read_text()


def test_t5_with_held_out_users_and_everything_on_s3(do: Job, inputs: dict, models: dict[str, str], s3: str) -> None:
    flags = {**SETTINGS, **inputs, **folders(s3), "llm": models["t5"], "epochs": 1, "weights": "mean", "zero_stage": 2}
    flags |= {"activation_checkpointing": True, "profile": True, "llm_quantization": "nf4"}
    before = Path(models["t5"], "model.safetensors").read_bytes()
    done = do(train, **{**flags, "validation": None, "validation_fraction": 0.4})
    assert done.code == 0
    spent = done.result["profile"]["seconds"]
    assert set(spent) == {"train", "validate", "save", "join", "read histories", "waiting"}
    assert all(seconds > 0 for seconds in spent.values())
    assert 0 < done.result["requests"] < 24
    assert done.result["requests"] % 4 == 0, "a user's requests are on both sides"
    assert Path(models["t5"], "model.safetensors").read_bytes() == before
    assert {file.uri.rsplit("/", 1)[1] for file in list_files(folders(s3)["plug"])} == {
        "README.md",
        "plug.json",
        "plug.safetensors",
    }
    assert any("/runs/r/checkpoint_" in file.uri for file in list_files(folders(s3)["runs"]))
    with local_folder(folders(s3)["plug"]) as folder:
        assert plug_record.fingerprint(folder) == done.result["fingerprint"]
        assert "in front of the frozen LLM, whose weights are quantized to nf4." in (folder / "README.md").read_text()
        layers = load_plug(folder).model.llm.modules()
        assert {layer.kind for layer in layers if isinstance(layer, QuantizedLinear)} == {"nf4"}


def test_the_typical_behavior_is_the_mean_of_what_training_requests_see(inputs: dict, undisturbed: Path) -> None:
    vectors = [np.frombuffer(one, "<f2") for row in requests() for one in seen(inputs["store"], row, 512)]
    found = weights(undisturbed / "plug")["typical_behavior"]
    np.testing.assert_allclose(found, np.mean(vectors, axis=0, dtype=np.float64), rtol=0, atol=1e-6)  # float32


def test_drawn_behaviors_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    histories = [rng.normal(size=(number % 20, 3)).astype("<f2") for number in range(400)]
    rows = pa.table(
        {"request_id": [f"r{number}" for number in range(400)], "history": [h.tobytes() for h in histories]}
    )
    whole = some_vectors(rows)
    assert 60 < len(whole) < 140  # a random quarter of 400
    assert some_vectors(rows.take(rng.permutation(400))) == whole
    assert {**some_vectors(rows[:150]), **some_vectors(rows[150:])} == whole
    for request, vectors in whole.items():
        history = histories[int(request[1:])].tolist()
        positions = [history.index(vector) for vector in np.frombuffer(vectors, "<f2").reshape(-1, 3).tolist()]
        assert len(positions) == min(8, len(history))
        assert positions == sorted(set(positions))
        assert not history or (positions[0], positions[-1]) == (0, len(history) - 1)


def some_vectors(rows: pa.Table) -> dict[str, bytes]:
    found = train_data._some_vectors(train_data._share(rows, share=0.25), width=3)
    return dict(zip(found["request_id"].to_pylist(), found["vectors"].to_pylist(), strict=True))


def test_a_request_never_sees_its_future(
    do: Job, inputs: dict, models: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    """The last requests are as of the fifth day, so that behaviors of the fifth day change nothing."""
    fifth = START + timedelta(days=4)
    assert max(row["as_of"] for row in requests()) == fifth
    changed = [{**row, "text": "quite different"} if row["timestamp"] == fifth else row for row in behaviors()]
    store = fill_store(tmp_path / "store", models["encoder"], changed)
    done = do(train, **SETTINGS, **{**inputs, "store": str(store)}, **folders(tmp_path))
    assert (done.code, done.result["without_history"]) == (0, 0)
    for kind in ("training", "validation"):
        assert curve(tmp_path / "plug", kind).tolist() == curve(undisturbed / "plug", kind).tolist()
    seen = weights(undisturbed / "plug")
    for name, value in weights(tmp_path / "plug").items():
        np.testing.assert_array_equal(value, seen[name], err_msg=name)
