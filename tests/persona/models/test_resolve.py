"""Finding models: local, on the hub and on S3; what is refused; when two have the same fingerprint."""

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
    """A copy of the encoder that a test may modify."""
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


def test_a_copy_of_a_model_has_the_same_fingerprint(encoder_folder, copy):
    assert fingerprint(copy) == encoder_folder.fingerprint


def test_other_weights_have_another_fingerprint(encoder_folder, tmp_path):
    assert fingerprint(tiny_encoder(tmp_path, seed=1)) != encoder_folder.fingerprint


def test_training_that_moves_every_weight_changes_the_fingerprint_of_large_files(encoder_folder, copy):
    # Much larger than the 64 samples of 64 KiB that are hashed.
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
def test_every_kind_of_tokenizer_file_changes_the_fingerprint(encoder_folder, copy, name):
    (copy / name).write_text("{}")
    assert fingerprint(copy) != encoder_folder.fingerprint


def test_a_readme_does_not_change_the_fingerprint(encoder_folder, copy):
    (copy / "README.md").write_text("a card")
    assert fingerprint(copy) == encoder_folder.fingerprint


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--llm: there is no folder '/.*/missing'.*hub id"):
        models.resolve(str(tmp_path / "missing"), flag="--llm")


def test_a_folder_without_config_json_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"--llm: .* has no config\.json"):
        models.resolve(str(copy), flag="--llm")


def test_pickled_weights_are_never_loaded(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors weights; pickled weights are never loaded"):
        models.resolve(str(copy), flag="--llm")


@pytest.mark.parametrize("name", ["somebody/unheard-of", "not a name at all", "a/b/c"])
def test_an_unavailable_hub_id_is_refused(monkeypatch, tmp_path, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"--encoder: '{name}' is neither a local folder nor available on the hub"):
        models.resolve(name, flag="--encoder")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "persona-plug"


def test_a_model_on_s3_has_the_same_fingerprint_and_is_downloaded_once(s3, cache, encoder_folder):
    uri = f"{s3}/models/encoder"
    storage.copy_folder(str(encoder_folder.path), uri)
    found = models.resolve(f"{uri}/", flag="--encoder")
    assert found.fingerprint == encoder_folder.fingerprint
    before = (found.path / "config.json").stat().st_mtime_ns
    assert models.resolve(uri, flag="--encoder").path == found.path
    assert (found.path / "config.json").stat().st_mtime_ns == before
    assert [folder.name for folder in cache.iterdir()] == [found.path.name]


def test_a_retrained_model_at_the_same_prefix_is_downloaded_again(s3, cache, encoder_folder, tmp_path):
    uri = f"{s3}/models/encoder"
    storage.copy_folder(str(encoder_folder.path), uri)
    models.resolve(uri, flag="--encoder")
    filesystem, path = storage.open_filesystem(f"{uri}/model.safetensors")
    before = filesystem.get_file_info(path)
    retrained = tiny_encoder(tmp_path / "retrained", seed=1)
    while filesystem.get_file_info(path).mtime == before.mtime:  # in whole seconds
        storage.copy_folder(str(retrained), uri)
    assert filesystem.get_file_info(path).size == before.size
    assert models.resolve(uri, flag="--encoder").fingerprint == fingerprint(retrained)


def test_of_two_concurrent_downloads_the_first_copy_is_kept(s3, cache, encoder_folder, monkeypatch):
    uri = f"{s3}/models/encoder"
    storage.copy_folder(str(encoder_folder.path), uri)
    copy_folder, first = storage.copy_folder, []

    def copy_after_another_process(source: str, target: str) -> None:
        copy_folder(source, target)
        if not first:
            first.append(Path())
            first.append(models.resolve(uri, flag="--encoder").path / "model.safetensors")
            first.append(first[1].stat().st_ino)

    monkeypatch.setattr(storage, "copy_folder", copy_after_another_process)
    second = models.resolve(uri, flag="--encoder").path / "model.safetensors"
    assert [second, second.stat().st_ino] == first[1:]
    assert len(list(cache.iterdir())) == 1


def test_an_empty_prefix_on_s3_is_refused(s3, cache):
    with pytest.raises((InputError, StorageError, UsageError), match=r"--llm: .*s3://.*/nothing"):
        models.resolve(f"{s3}/nothing", flag="--llm")
    assert not cache.exists()
