"""What cannot work is refused in words, with exit code 2, and before Ray is started."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from jobs import demo, embed, evaluate, generate, import_lamp, train
from persona.errors import UsageError
from persona.storage import write_bytes
from tests.encoders import transformer
from tests.jobs.conftest import START, Job, behaviors, new_plug, requests, write
from tests.models import tiny_encoder, tiny_llama


def ray_runs() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@pytest.fixture
def refused(refuse: Job, tmp_path: Path) -> Iterator[Any]:
    """Calls a job and gives what it said; it has refused, and has not started Ray or made anything in `new`."""
    before = ray_runs()

    def call(*job_and: Any, **flags: Any) -> str:
        done = refuse(*job_and, **flags)
        assert done.code == 2, done.said
        assert done.result is None
        assert done.said.startswith("error: ")
        assert ray_runs() == before
        return done.said

    yield call
    assert not (tmp_path / "new").exists()


@pytest.fixture
def embedding(models: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Flags of an `embed` that would work."""
    source = write(str(tmp_path / "in.parquet"), behaviors(2, 2))
    return {"histories": source, "store": str(tmp_path / "new"), "encoder": models["encoder"], "max_tokens": "32"}


@pytest.fixture
def training(models: dict[str, str], filled_store: Path, tmp_path: Path) -> dict[str, str]:
    """Flags of a `train` that would work."""
    source = write(str(tmp_path / "requests.parquet"), requests())
    new = {"plug": str(tmp_path / "new" / "plug"), "runs": str(tmp_path / "new" / "runs")}
    return {"requests": source, "store": str(filled_store), "llm": models["llama"], "run": "a", **new}


@pytest.fixture
def generating(filled_store: Path, plug: str, training: dict[str, str]) -> dict[str, str]:
    """Flags of a `generate` that would work."""
    return {"requests": training["requests"], "store": str(filled_store), "plug": plug}


def test_a_missing_column(refused: Any, embedding: dict[str, str], training: dict[str, str]) -> None:
    write(embedding["histories"], [{"user_id": "a", "body": "b"}])
    said = refused(embed, **embedding)
    assert "no column 'text'" in said
    assert "body (string)" in said
    assert "--columns text=COLUMN" in said

    without = [{k: v for k, v in row.items() if k != "target"} for row in requests()]
    write(training["requests"], without)
    said = refused(train, **training)
    assert "no column 'target'; training and scoring need it" in said
    assert "request_id (string)" in said


def test_a_column_of_the_wrong_type(refused: Any, embedding: dict[str, str], training: dict[str, str]) -> None:
    write(embedding["histories"], [{"user_id": "a", "text": 1.5}])
    assert "column 'text'" in (said := refused(embed, **embedding))
    assert "is double; it must be" in said
    write(training["requests"], [{**row, "as_of": [START]} for row in requests()])
    assert "column 'as_of'" in refused(train, **training)


def test_a_misspelled_optional_column(
    refused: Any, embedding: dict[str, str], training: dict[str, str], generating: dict[str, str], tmp_path: Path
) -> None:
    rows = [{("asof" if name == "as_of" else name): value for name, value in row.items()} for row in requests()]
    write(training["requests"], rows)
    for job, flags in ((train, training), (generate, generating), (evaluate, {**generating, "out": str(tmp_path)})):
        for more in ({}, {"dry_run": True}):
            said = refused(job, **flags, **more)
            assert "has no column 'as_of', but 'asof'" in said
            assert "--request-columns as_of=asof" in said
    write(embedding["histories"], [{"user_id": "u", "text": "t", "time_stamp": 1}])
    assert "--columns timestamp=time_stamp" in refused(embed, **embedding)


def test_a_file_that_cannot_be_read(refused: Any, embedding: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("user_id,text\n")
    said = refused(embed, **{**embedding, "histories": str(tmp_path)}, sync=True)
    assert "'more.csv'" in said
    assert "--exclude '*.csv'" in said


def test_an_unknown_flag_and_an_unknown_key(refused: Any, embedding: dict[str, str], tmp_path: Path) -> None:
    assert refused(embed, **embedding, actor=2).strip() == "error: unknown flag --actor; did you mean --actors?"
    config = tmp_path / "config.yaml"
    config.write_text("historys: there\n")
    said = refused(embed, **embedding, config=config)
    assert "unknown key historys; did you mean histories?" in said
    config.write_text(json.dumps({"pooling": "median"}))
    assert "pooling 'median': must be auto, cls, mean, max, lasttoken, " in refused(embed, **embedding, config=config)


def test_an_encoder_that_cannot_be_used_as_asked(refused: Any, embedding: dict[str, str], tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    fnet = transformer(tmp_path / "fnet", "fnet", **size)
    assert "is of type fnet, which is not supported" in refused(embed, **{**embedding, "encoder": str(fnet)})
    deberta = transformer(tmp_path / "deberta", "deberta", **size)
    said = refused(embed, **{**embedding, "encoder": str(deberta)}, precision="bf16")
    assert "encoders of type deberta cannot compute in bf16; use --precision fp32 or auto" in said
    assert "--width 33: the vectors of" in refused(embed, **embedding, width=33)
    roberta = transformer(tmp_path / "roberta", "roberta", max_position_embeddings=32, **size)
    said = refused(embed, **{**embedding, "encoder": str(roberta), "max_tokens": "32"})
    assert "at most 31 tokens of a text, not 32" in said


def test_a_plug_of_other_vectors_of_the_same_encoder(
    refused: Any, generating: dict[str, str], filled_store: Path, plug: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plug, tmp_path / "plug"))
    record = json.loads((folder / "plug.json").read_text())
    (folder / "plug.json").write_text(json.dumps({**record, "pooling": "mean", "document_prompt": "passage: "}))
    said = refused(generate, **{**generating, "plug": str(folder)})
    assert "pooling 'mean' instead of 'cls'; document prompt 'passage: ' instead of ''" in said


def test_an_encoder_that_is_not_the_store_s(
    refused: Any, embedding: dict[str, str], training: dict[str, str], filled_store: Path, tmp_path: Path
) -> None:
    other = str(tiny_encoder(tmp_path / "other", seed=1))
    said = refused(embed, **{**embedding, "store": str(filled_store), "encoder": other})
    assert "fingerprint is" in said
    assert "another --store" in said
    said = refused(embed, **{**embedding, "store": str(filled_store), "max_tokens": "16"})
    assert "max_tokens is 32 in the store and 16 here" in said
    assert "buckets is 4 in the store and 8 here" in refused(
        embed, **{**embedding, "store": str(filled_store), "buckets": 8}
    )
    assert "give the store's encoder with --encoder" in refused(train, **training, encoder=other)


def test_a_plug_that_belongs_to_another_llm_or_store(
    refused: Any, generating: dict[str, str], models: dict[str, str], tmp_path: Path
) -> None:
    other_llm = str(tiny_llama(tmp_path / "llm", seed=1))
    assert "the plug was trained for the LLM" in refused(generate, **generating, llm=other_llm)
    other_encoder = str(tiny_encoder(tmp_path / "encoder", seed=1))
    other_plug = new_plug(tmp_path / "plug", other_encoder, models["llama"])
    for job, more in ((generate, {}), (evaluate, {"out": str(tmp_path / "new")})):
        said = refused(job, **{**generating, **more, "plug": other_plug})
        assert "was trained on vectors of" in said
        assert "train a plug on this one" in said
    assert "no complete plug here" in refused(generate, **{**generating, "plug": str(tmp_path)})


def test_s3_without_credentials_or_bucket(
    refused: Any, embedding: dict[str, str], s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--store: there is no bucket" in refused(embed, **{**embedding, "store": "s3://nobody-has-made-this/x"})
    assert "names no bucket" in refused(embed, **{**embedding, "store": "s3://"})
    assert f"--histories: there is nothing at {s3}/in" in refused(embed, **{**embedding, "histories": f"{s3}/in"})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    said = refused(embed, **{**embedding, "store": f"{s3}/store"})
    assert "needs credentials and none were found" in said
    assert "AWS_ACCESS_KEY_ID" in said


def test_a_uri_with_a_space(refused: Any, embedding: dict[str, str]) -> None:
    said = refused(embed, **{**embedding, "store": "s3://bucket/my store"})
    assert "--store: 's3://bucket/my store' contains a space" in said


def test_an_input_without_any_row(refused: Any, embedding: dict[str, str], tmp_path: Path) -> None:
    write_bytes(embedding["histories"], b"")
    assert "--histories: every file of the input is empty" in refused(embed, **embedding)
    assert "does not exist" in refused(embed, **{**embedding, "histories": str(tmp_path / "nowhere")})
    (tmp_path / "empty").mkdir()
    said = refused(embed, **{**embedding, "histories": str(tmp_path / "empty")})
    assert "has no file to read; file names must end in .parquet" in said


def test_batch_sizes_that_do_not_multiply_out(refused: Any, training: dict[str, str]) -> None:
    said = refused(train, **training, global_batch=64, micro_batch=12, workers=3)
    assert "--global-batch 64 is not a multiple of --workers 3 × --micro-batch 12 = 36" in said


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        (train, {"run": "a/b"}, "--run 'a/b': must be a name of letters"),
        (train, {"zero_stage": 4}, "--zero-stage 4: must be 1, 2 or 3"),
        (train, {"zero_stage": 3, "llm_quantization": "nf4"}, "--llm-quantization nf4 and --zero-stage 3 exclude each"),
        (train, {"zero_stage": 3, "compile": True}, "--compile and --zero-stage 3 exclude each other"),
        (train, {"llm_quantization": "int8", "compile": True}, "--compile and --llm-quantization int8 exclude each"),
        (train, {"activation_checkpointing": True, "compile": True}, "--compile and --activation-checkpointing excl"),
        (train, {"micro_batch": "all"}, "--micro-batch 'all': must be auto or a whole number"),
        (train, {"micro_batch": 2.5}, "--micro-batch '2.5': must be auto or a whole number"),
        (
            train,
            {"weights": "mean", "learn_temperature": True},
            "--learn-temperature has no effect with --weights mean",
        ),
        (train, {"validation_fraction": 0}, "--validation-fraction 0.0: must be above 0 and below 1"),
        (generate, {"sample": True, "beams": 2}, "--sample draws one answer per request and needs --beams 1, not 2"),
        (generate, {"persona": ("own", "own")}, "--persona own own: give one or more of own, none, other, mean"),
        (generate, {"persona": ("own", "none"), "variant": "x"}, "--variant names the answers of one persona"),
        (generate, {"limit": 0}, "--limit 0: must be 1 or more"),
        (evaluate, {"out": "o", "losses_only": True, "variant": ("own",)}, "--losses-only scores none; remove one"),
    ],
)
def test_values_that_cannot_work(
    refused: Any, training: dict[str, str], generating: dict[str, str], job: Any, flags: Any, message: str
) -> None:
    works = training if job is train else generating
    assert message in refused(job, **{**works, **flags})


@pytest.mark.parametrize("job", [embed, evaluate, generate, import_lamp, train], ids=lambda job: job.__name__)
@pytest.mark.parametrize("fraction", ["-1", "1.1"])
def test_a_share_of_rejects_that_is_no_share(refused: Any, job: Any, fraction: str) -> None:
    flags = {
        embed: {"histories": "h", "store": "s"},
        evaluate: {"requests": "r", "store": "s", "plug": "p", "out": "o"},
        generate: {"requests": "r", "store": "s", "plug": "p"},
        import_lamp: {"task": "LaMP_5", "questions": "q", "out": "o"},
        train: {"requests": "r", "store": "s", "plug": "p", "run": "a", "runs": "k"},
    }
    said = refused(job, **flags[job], max_reject_fraction=fraction)
    assert said == f"error: --max-reject-fraction {float(fraction)}: must be from 0 to 1\n"


def test_a_config_that_is_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(UsageError, match="--batch-size 0: must be 1 or more"):
        generate.Config(requests="r", store="s", plug="p", batch_size=0)
    with pytest.raises(UsageError, match="--limit 0: must be 1 or more"):
        demo.Config(limit=0)


def test_a_model_that_is_not_there_or_is_pickled(refused: Any, embedding: dict[str, str], tmp_path: Path) -> None:
    assert "--encoder: there is no folder" in refused(embed, **{**embedding, "encoder": str(tmp_path / "no")})
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights are never loaded" in refused(embed, **{**embedding, "encoder": str(pickled)})


def test_models_that_are_not_whole(
    refused: Any, embedding: dict[str, str], training: dict[str, str], tmp_path: Path
) -> None:
    encoder, llm = tiny_encoder(tmp_path / "encoder", seed=1), tiny_llama(tmp_path / "llm", seed=1)
    for folder, absent in ((encoder, "encoder.layer.1.output.dense.weight"), (llm, "lm_head.weight")):
        weights = load_file(folder / "model.safetensors")
        del weights[absent]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing (encoder.layer.1.output.dense.weight)" in refused(embed, **{**embedding, "encoder": str(encoder)})
    assert "1 missing (lm_head.weight)" in refused(train, **{**training, "llm": str(llm)})


def test_broken_folders(refused: Any, embedding: dict[str, str], generating: dict[str, str], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(embedding["encoder"], tmp_path / "broken"))
    for name, content, message in (
        ("tokenizer.json", b"[" * 100_000, "its tokenizer cannot be loaded (maximum recursion depth"),
        ("model.safetensors", (2**60).to_bytes(8, "little"), "model.safetensors is not a whole safetensors file"),
        ("config.json", b"{", "config.json is not valid JSON"),
    ):
        (broken / name).write_bytes(content)
        assert message in refused(embed, **{**embedding, "encoder": str(broken)})
    plug = Path(shutil.copytree(generating["plug"], tmp_path / "plug"))
    (plug / "plug.safetensors").write_bytes((plug / "plug.safetensors").read_bytes()[:-1])
    assert "plug.safetensors is not a whole safetensors file" in refused(generate, **{**generating, "plug": str(plug)})
    assert "means another path" in refused(embed, **{**embedding, "store": str(tmp_path / "new%20store")})
