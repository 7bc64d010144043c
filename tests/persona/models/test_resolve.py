"""Finding models: local, on the hub and on S3; what is refused; when two have the same fingerprint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertModel

from persona import storage
from persona.errors import InputError, StorageError, UsageError
from persona.models import contents, loading, resolve as models
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


FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "source.spm",
    "sentencepiece.bpe.model", "bpe.codes", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "sentence_xlm-roberta_config.json", "1_Pooling/config.json", "2_Dense/config.json",
    "2_Dense/model.safetensors", "query/0_Router/config.json",
]  # fmt: skip


@pytest.fixture
def sentences(copy: Path) -> Path:
    """A copy of the encoder as a folder of sentence-transformers with three modules."""
    paths = ["", "1_Pooling", "2_Dense", "query"]
    (copy / "modules.json").write_text(json.dumps([{"idx": i, "path": path} for i, path in enumerate(paths)]))
    for name in FILES[-4:]:
        write(copy / name)
    return copy


def write(file: Path, value: float = 0.0) -> None:
    """Makes a file that holds `value`, if only as a blank more or less."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({"weight": torch.full((3,), value)}, file)
    else:
        file.write_text((file.read_text() if file.exists() else "{}") + " " * bool(value))


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_changes_results_changes_the_fingerprint(sentences, name):
    before = fingerprint(sentences)
    write(sentences / name, 1.0)
    assert fingerprint(sentences) != before


@pytest.mark.parametrize(
    "name",
    ["README.md", "picture.png", "onnx/model.onnx", "onnx/config.json", "openvino/model.safetensors",
     "3_Other/config.json", "model-00001-of-00002.safetensors", "training_args.bin", ".cache/config.json"],
)  # fmt: skip
def test_no_other_file_changes_the_fingerprint(sentences, name):
    before = fingerprint(sentences)
    write(sentences / name)
    assert fingerprint(sentences) == before


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_changes_results_is_downloaded(name):
    assert is_downloaded(name)


@pytest.mark.parametrize(
    "name", ["onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "consolidated.safetensors", "modeling.py"]
)
def test_no_code_pickle_or_second_copy_is_downloaded(name):
    assert not is_downloaded(name)


def is_downloaded(name: str) -> bool:
    patterns = {"allow_patterns": [*contents.DOWNLOADED], "ignore_patterns": [*contents.NOT_DOWNLOADED]}
    return bool([*filter_repo_objects([name], **patterns)])


def test_a_file_that_moves_to_another_name_changes_the_fingerprint(copy):
    write(copy / "vocab.txt")
    before = fingerprint(copy)
    (copy / "vocab.txt").rename(copy / "vocab.json")
    assert fingerprint(copy) != before


def test_every_shard_changes_the_fingerprint(encoder_folder, copy):
    weights = load_file(copy / "model.safetensors")
    BertModel.from_pretrained(copy).save_pretrained(copy, max_shard_size="30KB")
    (copy / "model.safetensors").unlink(missing_ok=True)
    before = fingerprint(copy)
    shards = sorted(copy.glob("model-*.safetensors"))
    assert len(shards) > 2 and set().union(*map(load_file, shards)) == set(weights)
    for shard in shards:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert fingerprint(copy) != before
        shard.write_bytes(whole)
    assert fingerprint(copy) == before
    shards[1].unlink()
    with pytest.raises(
        InputError, match=rf"1 of the {len(shards)} files that .*index.json names are missing: model-00002"
    ):
        fingerprint(copy)


def with_header(n_bytes: int, text: bytes) -> bytes:
    return n_bytes.to_bytes(8, "little") + text


BROKEN_WEIGHTS = {
    "empty": b"",
    "a header of 2**60 bytes": with_header(2**60, b"{}"),
    "a header of 99 MB that is not there": with_header(99_000_000, b"{}"),
    "not JSON": with_header(8, b"not JSON"),
    "deep": with_header(500_000, b'{"a":' * 100_000),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n",
    "of another kind": with_header(60, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9999999]}} '),
}


@pytest.mark.parametrize("name", ["model.safetensors", "2_Dense/model.safetensors"])
@pytest.mark.parametrize("data", BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS.keys())
def test_broken_weights_are_refused(sentences, name, data):
    (sentences / name).write_bytes(data)
    with pytest.raises(InputError, match=r"--encoder: '.*': model\.safetensors is not a whole safetensors file .*copy"):
        fingerprint(sentences)


def test_truncated_weights_are_refused(copy):
    whole = (copy / "model.safetensors").read_bytes()
    for n_bytes in (len(whole) - 1, len(whole) // 2, 100, 3):
        (copy / "model.safetensors").write_bytes(whole[:n_bytes])
        with pytest.raises(InputError, match="is not a whole safetensors file"):
            fingerprint(copy)


@pytest.mark.parametrize("text", ["", "{", "3", '"text"', "[" * 100_000, "\udcff"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "1_Pooling/config.json", "modules.json"]
)
def test_broken_json_is_refused(sentences, name, text):
    (sentences / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"{name} (is not valid JSON|must be a (JSON object|list)).*copy"):
        fingerprint(sentences)


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "model.safetensors"])
def test_a_file_that_cannot_be_read_is_refused(copy, name):
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to("/proc/self/mem")  # reading it fails for root, too
    with pytest.raises(InputError, match="--encoder: '.*/copy': .*(Input/output error|not a whole safetensors file)"):
        fingerprint(copy)


def test_links_in_a_circle_are_refused(copy, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to(copy / "config.json")
    for folder, reason in ((tmp_path / "loop", "there is no folder"), (copy, r"it has no config\.json")):
        with pytest.raises(InputError, match=reason):
            fingerprint(folder)


@pytest.mark.parametrize("path", ["..", "../other", "/etc", None, 3])
def test_modules_outside_the_folder_are_refused(copy, path):
    (copy / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(InputError, match=r"modules\.json must be a list of modules in subfolders"):
        fingerprint(copy)


@pytest.mark.parametrize(
    "index",
    [[], {}, *({"weight_map": names} for names in ({}, [], {"a": 3}, {"a": "../x.safetensors"}, {"a": "/x"}))],
    ids=str,
)  # fmt: skip
def test_a_broken_index_is_refused(copy, index):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json (does not say which files|must be a JSON object)"):
        fingerprint(copy)


def test_shards_without_their_index_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    with pytest.raises(
        InputError, match=r"it has model-00001-of-00002\.safetensors, but neither model\.safetensors nor"
    ):
        fingerprint(copy)


def test_an_adapter_is_not_a_model(copy):
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"it has an adapter \(adapter_config\.json\) beside the model; merge"):
        fingerprint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json, .*: it is an adapter, which must be merged"):
        fingerprint(copy)


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


def test_a_model_on_the_hub_and_on_s3_has_the_same_fingerprint(s3, cache, sentences, tmp_path, monkeypatch):
    for name in [*FILES, "README.md", "onnx/config.json", "consolidated.safetensors", "pytorch_model.bin"]:
        write(sentences / name)
    snapshot = tmp_path / "hub" / "models--me--mine" / "snapshots" / ("0" * 40)
    wanted = [file for file in sentences.rglob("*") if is_downloaded(file.relative_to(sentences).as_posix())]
    for number, file in enumerate(wanted):
        # As the hub's cache has them: links to files named by their content.
        link, blob = (
            snapshot / file.relative_to(sentences),
            tmp_path / "hub" / "models--me--mine" / "blobs" / f"{number}",
        )
        for new in (link, blob):
            new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    storage.copy_folder(str(sentences), f"{s3}/models/mine")
    names = ["me/mine", f"{s3}/models/mine", str(sentences)]
    found = [models.resolve(name, revision="0" * 40, flag="--encoder") for name in names]
    assert len({folder.path for folder in found}) == 3
    assert len({folder.fingerprint for folder in found}) == 1


def test_a_model_on_s3_has_the_same_fingerprint_and_is_downloaded_once(s3, cache, encoder_folder):
    uri = f"{s3}/models/encoder"
    storage.copy_folder(str(encoder_folder.path), uri)
    found = models.resolve(f"{uri}/", flag="--encoder")
    assert found.fingerprint == encoder_folder.fingerprint
    before = (found.path / "config.json").stat().st_mtime_ns
    assert models.resolve(uri, flag="--encoder").path == found.path
    assert (found.path / "config.json").stat().st_mtime_ns == before
    assert [folder.name for folder in cache.iterdir()] == [found.path.name]


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b", "a?b", "a+b", "é", "100%", "-"])
def test_a_model_in_a_folder_of_any_name(encoder_folder, tmp_path, name):
    found = models.resolve(str(shutil.copytree(encoder_folder.path, tmp_path / name)), flag="--encoder")
    assert (found.path, found.fingerprint) == (tmp_path / name, encoder_folder.fingerprint)
    loading.load_tokenizer(found)
    loading.load_model(AutoModel, found, dtype=torch.float32)


@pytest.mark.parametrize("name", ["a+b", "a=b,c", "a@b&c$d", "it's(1)", "~a!b*c;d:e"])
def test_a_model_under_an_s3_prefix_of_any_allowed_name(each_s3, cache, encoder_folder, name):
    storage.copy_folder(str(encoder_folder.path), f"{each_s3}/{name}")
    found = models.resolve(f"{each_s3}/{name}", flag="--encoder")
    assert found.fingerprint == encoder_folder.fingerprint
    loading.load_tokenizer(found)


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b", "a?b", "é"])
def test_an_s3_prefix_that_a_library_would_misread_is_refused(s3, name):
    with pytest.raises(UsageError, match=r"--encoder: '.*' contains (a space|the character '.'); use ASCII letters"):
        models.resolve(f"{s3}/{name}", flag="--encoder")


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
