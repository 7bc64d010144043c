"""Finds a pretrained model: a hub id, a folder or an S3 prefix becomes local files with a fingerprint."""

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from persona.errors import InputError

# Weights, configuration and tokenizer; never code, and never a pickled checkpoint.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
# The files of all kinds of tokenizers.
_TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A pretrained model on this machine's disk.

    `fingerprint` identifies configuration, weights and tokenizer, independent of where the model is stored.
    """

    name: str
    revision: str
    path: Path
    fingerprint: str

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        return dict(json.loads((self.path / "config.json").read_text()))

    def card(self) -> dict[str, str]:
        """What a table or a plug records about the model: the name as given, revision and fingerprint."""
        known = asdict(self)
        del known["path"]
        return known


def resolve(name: str, *, revision: str = "main", flag: str) -> ModelFolder:
    """Finds the model `name`: a local folder, a folder on `s3://`, or an id on the Hugging Face hub.

    Models from the hub or S3 are downloaded once per node, into the cache folder of the hub.

    Raises:
        InputError: the model does not exist, or its folder has no `config.json` or no safetensors weights.
    """
    if name.startswith("s3://"):
        path = _from_s3(name, flag)
    elif Path(name).expanduser().is_dir():
        path = Path(name).expanduser().resolve()
    elif name.startswith(("/", "./", "../", "~")):
        raise InputError(f"{flag}: there is no folder {name!r}; give a model's folder, an s3:// folder or a hub id")
    else:
        path = _from_hub(name, revision, flag)
    if not (path / "config.json").is_file():
        raise InputError(f"{flag}: {name!r} has no config.json, so it is not a saved transformers model")
    if not any(path.glob("*.safetensors")):
        raise InputError(
            f"{flag}: {name!r} has no *.safetensors weights; pickled weights are never loaded, so convert them first"
        )
    return ModelFolder(name=name, revision=revision, path=path, fingerprint=_fingerprint(path))


def _from_hub(name: str, revision: str, flag: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{flag}: {name!r} is neither a local folder nor available on the hub at revision {revision!r} "
            f"({type(error).__name__}); check the spelling, the network and HF_HUB_OFFLINE, or give a folder"
        ) from error


def _from_s3(uri: str, flag: str) -> Path:
    from huggingface_hub.constants import HF_HOME
    from pyarrow.fs import FileSelector

    from persona import storage

    uri = storage.check_uri(uri, flag=flag)
    storage.check_reachable(uri, flag=flag)
    filesystem, prefix = storage.open_filesystem(uri)
    # The cache key includes modification times: a later upload to the same prefix gets a new folder, even if all file
    # sizes are the same, as after more training.
    listed = sorted(
        (file.path, file.size, file.mtime_ns) for file in filesystem.get_file_info(FileSelector(prefix, recursive=True))
    )
    key = hashlib.blake2b(repr((uri, listed)).encode(), digest_size=8).hexdigest()
    target = Path(HF_HOME) / "persona-plug" / f"{uri.rsplit('/', 1)[-1]}-{key}"
    if not target.is_dir():
        draft = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        storage.copy_folder(uri, os.fspath(draft))
        try:
            draft.rename(target)
        except OSError:
            # Another process on this node was faster and may already be reading its copy, so keep that one.
            shutil.rmtree(draft, ignore_errors=True)
            if not target.is_dir():
                raise
    return target


def _fingerprint(path: Path) -> str:
    """Hash of configuration, tokenizer, tensor names and shapes, and evenly spaced samples of the weights.

    Hashing all of a 40 GB folder would take a minute at the start of each job. Training changes every weight, so
    samples are enough to notice it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*path.glob("*.safetensors"), path / "config.json", *(path / name for name in _TOKENIZER)]):
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if file.suffix != ".safetensors":
                digest.update(stream.read())
                continue
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header_bytes))
            step = max((size - header_bytes) // _SAMPLES_PER_FILE, _SAMPLE_BYTES)
            for start in range(8 + header_bytes, size, step):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def sentence_pooling(folder: ModelFolder) -> Literal["cls", "mean"]:
    """The pooling in the model's sentence-transformers configuration; `cls` if it has none."""
    file = folder.path / "1_Pooling" / "config.json"
    if file.is_file() and json.loads(file.read_text()).get("pooling_mode_mean_tokens"):
        return "mean"
    return "cls"
