"""Models: where they may lie, what is refused, and when two are the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona import storage
from persona.errors import InputError, StorageError, UsageError
from persona.models import resolve as models
from persona.models.resolve import ModelFolder
from tests.models import tiny_encoder


@pytest.fixture
def copy(encoder_folder: ModelFolder, tmp_path: Path) -> Path:
    """A copy of the encoder that a test may spoil."""
    return Path(shutil.copytree(encoder_folder.path, tmp_path / "elsewhere" / "copy"))


def fingerprint(folder: Path) -> str:
    return models.resolve(str(folder), flag="--encoder").fingerprint


def test_a_local_folder_is_found_with_its_configuration(encoder_folder):
    assert encoder_folder.config["model_type"] == "bert"
    assert encoder_folder.card() == {
        "name": encoder_folder.name,
        "revision": "main",
        "fingerprint": encoder_folder.fingerprint,
    }


def test_the_same_model_elsewhere_has_the_same_fingerprint(encoder_folder, copy):
    assert fingerprint(copy) == encoder_folder.fingerprint


def test_a_model_made_anew_from_another_seed_has_another_fingerprint(encoder_folder, tmp_path):
    assert fingerprint(tiny_encoder(tmp_path, seed=1)) != encoder_folder.fingerprint


def test_training_that_moves_every_weight_changes_the_fingerprint_of_large_files(encoder_folder, copy):
    # Much larger than what is read of it: 64 samples of 64 KiB.
    weights = {"large": torch.arange(6_000_000, dtype=torch.float32)}
    save_file(weights, copy / "model.safetensors")
    before = fingerprint(copy)
    save_file({"large": weights["large"] * (1 + 1e-6)}, copy / "model.safetensors")
    assert fingerprint(copy) != before


def test_one_changed_weight_of_a_small_model_changes_the_fingerprint(encoder_folder, copy):
    weights = load_file(copy / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][-1] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != encoder_folder.fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_another_tokenizer_or_configuration_changes_the_fingerprint(encoder_folder, copy, name):
    (copy / name).write_text((copy / name).read_text() + "\n")
    assert fingerprint(copy) != encoder_folder.fingerprint


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "vocab.json", "tokenizer.model", "spiece.model"])
def test_tokenizers_of_other_kinds_count_as_well(encoder_folder, copy, name):
    (copy / name).write_text("{}")
    assert fingerprint(copy) != encoder_folder.fingerprint


def test_a_file_for_people_does_not_change_the_fingerprint(encoder_folder, copy):
    (copy / "README.md").write_text("a card")
    assert fingerprint(copy) == encoder_folder.fingerprint


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--llm: there is no folder '/.*/missing'.*hub id"):
        models.resolve(str(tmp_path / "missing"), flag="--llm")


def test_a_folder_without_configuration_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"--llm: .* has no config\.json"):
        models.resolve(str(copy), flag="--llm")


def test_pickled_weights_are_never_loaded(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors weights; pickled weights are never loaded"):
        models.resolve(str(copy), flag="--llm")


@pytest.mark.parametrize("name", ["somebody/unheard-of", "not a name at all", "a/b/c"])
def test_a_hub_id_that_cannot_be_reached_is_refused(monkeypatch, tmp_path, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"--encoder: '{name}' is neither a folder here nor reachable"):
        models.resolve(name, flag="--encoder")


def test_the_pooling_is_the_one_that_the_model_asks_for(encoder_folder, copy):
    assert models.sentence_pooling(encoder_folder) == "cls"
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert models.sentence_pooling(models.resolve(str(copy), flag="--encoder")) == "mean"
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert models.sentence_pooling(models.resolve(str(copy), flag="--encoder")) == "cls"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "persona-plug"


def test_a_model_on_s3_is_the_same_model_and_is_fetched_once(s3, cache, encoder_folder):
    uri = f"{s3}/models/encoder"
    storage.copy_folder(str(encoder_folder.path), uri)
    found = models.resolve(f"{uri}/", flag="--encoder")
    assert found.fingerprint == encoder_folder.fingerprint
    before = (found.path / "config.json").stat().st_mtime_ns
    assert models.resolve(uri, flag="--encoder").path == found.path
    assert (found.path / "config.json").stat().st_mtime_ns == before
    assert [folder.name for folder in cache.iterdir()] == [found.path.name]


def test_a_retrained_model_under_the_same_prefix_is_seen(s3, cache, encoder_folder, tmp_path):
    uri = f"{s3}/models/encoder"
    storage.copy_folder(str(encoder_folder.path), uri)
    models.resolve(uri, flag="--encoder")
    filesystem, path = storage.open_filesystem(f"{uri}/model.safetensors")
    before = filesystem.get_file_info(path)
    retrained = tiny_encoder(tmp_path / "retrained", seed=1)
    while filesystem.get_file_info(path).mtime == before.mtime:  # object stores tell the time in whole seconds
        storage.copy_folder(str(retrained), uri)
    assert filesystem.get_file_info(path).size == before.size
    assert models.resolve(uri, flag="--encoder").fingerprint == fingerprint(retrained)


def test_when_two_fetch_a_model_the_first_copy_stays(s3, cache, encoder_folder, monkeypatch):
    uri = f"{s3}/models/encoder"
    storage.copy_folder(str(encoder_folder.path), uri)
    copy_folder, first = storage.copy_folder, []

    def copy_and_be_overtaken(source: str, target: str) -> None:
        copy_folder(source, target)
        if not first:
            first.append(Path())
            first.append(models.resolve(uri, flag="--encoder").path / "model.safetensors")
            first.append(first[1].stat().st_ino)

    monkeypatch.setattr(storage, "copy_folder", copy_and_be_overtaken)
    second = models.resolve(uri, flag="--encoder").path / "model.safetensors"
    assert [second, second.stat().st_ino] == first[1:]
    assert len(list(cache.iterdir())) == 1


def test_an_empty_prefix_on_s3_is_refused(s3, cache):
    with pytest.raises((InputError, StorageError, UsageError), match=r"--llm: .*s3://.*/nothing"):
        models.resolve(f"{s3}/nothing", flag="--llm")
    assert not cache.exists()
