"""Finds a pretrained model: a hub id, a folder or an S3 prefix becomes local files with a fingerprint."""

import hashlib
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona.errors import InputError
from persona.models import contents


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
        return contents.read_object(self.path, "config.json")

    def card(self) -> dict[str, str]:
        """What a table or a plug records about the model: the name as given, revision and fingerprint."""
        known = asdict(self)
        del known["path"]
        return known


def resolve(name: str, *, revision: str = "main", flag: str) -> ModelFolder:
    """Finds the model `name`: a local folder, a folder on `s3://`, or an id on the Hugging Face hub.

    Models from the hub or S3 are downloaded once per node, into the cache folder of the hub.

    Raises:
        InputError: the model does not exist, or a file in its folder is missing or broken.
    """
    if name.startswith("s3://"):
        path = _from_s3(name, flag)
    elif Path(name).expanduser().is_dir():
        path = Path(name).expanduser().resolve()
    elif name.startswith(("/", "./", "../", "~")):
        raise InputError(f"{flag}: there is no folder {name!r}; give a model's folder, an s3:// folder or a hub id")
    else:
        path = _from_hub(name, revision, flag)
    try:
        contents.check(path)
        fingerprint = contents.fingerprint(path)
    except (InputError, OSError) as error:
        raise InputError(f"{flag}: {name!r}: {error}") from error
    return ModelFolder(name=name, revision=revision, path=path, fingerprint=fingerprint)


def _from_hub(name: str, revision: str, flag: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*contents.DOWNLOADED],
                ignore_patterns=[*contents.NOT_DOWNLOADED],
            )
        )
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
    found = storage.retried(
        lambda: filesystem.get_file_info(FileSelector(prefix, recursive=True)), f"cannot list {uri}"
    )
    listed = sorted((file.path, file.size, file.mtime_ns) for file in found)
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
