"""Plugs on the Hugging Face hub, where `hf://owner/name` or `hf://owner/name@revision` is given in place of a folder.

A plug is downloaded once per node, into the hub's own cache, at the commit that the job started with.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persona import storage
from persona.errors import InputError, UsageError

SCHEME = "hf://"
_PLACE = re.compile(rf"{SCHEME}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub(uri: str) -> bool:
    """Whether the URI is on the hub rather than a folder."""
    return uri.startswith(SCHEME)


def parse(uri: str, *, flag: str) -> tuple[str, str]:
    """The repository and the revision of a URI on the hub. Raises UsageError for another form."""
    found = _PLACE.fullmatch(uri)
    if found is None:
        raise UsageError(f"{flag} {uri}: must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return found[1], found[2] or "main"


def check_plug_uri(given: str, *, flag: str) -> str:
    """The URI of a plug in normal form; one on the hub names its commit, so that every node reads the same plug.

    Raises:
        UsageError: it has a form that does not exist, or there is nothing at a folder.
        InputError: the hub has no such plug, or does not answer.
    """
    if not is_hub(given):
        uri = storage.check_uri(given, flag=flag)
        storage.check_reachable(uri, flag=flag)
        return uri
    repository, _ = parse(given, flag=flag)
    return f"{SCHEME}{repository}@{_download(given, flag=flag).name}"


@contextmanager
def local_plug_folder(uri: str) -> Iterator[Path]:
    """A local folder with the files of a plug, wherever it is."""
    if is_hub(uri):
        yield _download(uri, flag="--plug")
        return
    with storage.local_folder(uri) as folder:
        yield folder


def _download(uri: str, *, flag: str) -> Path:
    """The snapshot of a plug in the hub's cache; its folder is named after the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, revision = parse(uri, flag=flag)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=["plug.*", "README.md"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{flag} {uri}: the hub has no such plug at revision {revision!r}, or does not answer "
            f"({type(error).__name__}); check the spelling, the network, HF_TOKEN and HF_HUB_OFFLINE"
        ) from error
