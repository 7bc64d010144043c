"""One door to `s3://` and local paths: who wants to read or write anything, asks here for the way in.

Credentials, region and endpoint come from the environment or the machine's role, never from a URI, a flag or
an object that travels between processes: build a filesystem where it is used (a pickled one carries the
secret key in clear).

What passes by itself (`persona.retries`) is tried again: every function here that asks an object store ends well, or
with a `StorageError` within the time that `PERSONA_STORAGE_TIMEOUT_S` sets for each request or file.
"""

import contextlib
import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import pyarrow.fs as pafs
from botocore.exceptions import BotoCoreError, ClientError

from persona import s3
from persona.errors import StorageError, UsageError
from persona.retries import in_one_line, is_transient, persistently

T = TypeVar("T")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ANSWER_S = 5.0  # how long a store may be silent when `check_reachable` asks it
_ATTEMPTS = 4  # of that question, before a store that is not heard counts as one that is not there
_LISTINGS = 100  # of a folder that others make at this moment, before its absence is believed
# What may stand in the path of an S3 URI. Ray and pyarrow send a URI with other characters silently to the
# local disk, or read them as a query; both would be found out much later.
_KEY = re.compile(r"[A-Za-z0-9!_.*'()/=+,:@&$;~-]*")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file that exists: where, and how large."""

    uri: str
    size_bytes: int


def is_s3(uri: str) -> bool:
    """Whether the URI names an object store rather than this machine's disk."""
    return uri.startswith(s3.PREFIX)


def check_uri(uri: str, *, flag: str) -> str:
    """The URI in its one normal form: no trailing slash, a local path absolute.

    Raises `UsageError`, naming `flag`, for a URI that the libraries below would misunderstand. The text of an
    S3 URI that may hold a password is not repeated.
    """
    if not uri.strip():
        raise UsageError(f"{flag}: the path is empty; give a local path or s3://bucket/prefix")
    scheme, colon, rest = uri.partition("://")
    if not colon or scheme == "file":
        return os.path.normpath(Path(rest if colon else uri).expanduser().absolute())
    if scheme != "s3":
        raise UsageError(f"{flag}: unknown scheme {scheme}://; give a local path or s3://bucket/prefix")
    bucket, _, key = rest.partition("/")
    if "@" in bucket:
        raise UsageError(
            f"{flag}: credentials do not belong in a URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    if not bucket:
        raise UsageError(f"{flag}: {uri!r} names no bucket; give s3://bucket/prefix")
    bad = next((c for c in key if not _KEY.fullmatch(c)), None)
    if bad is not None:
        name = "a space" if bad == " " else f"the character {bad!r}"
        raise UsageError(f"{flag}: {uri!r} holds {name}; use ASCII letters, digits and - _ . = / in an s3:// path")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{flag}: {bucket!r} cannot be a bucket: 3 to 63 of a-z 0-9 . - are allowed")
    parts = [part for part in key.split("/") if part]
    if ".." in parts or "." in parts:
        raise UsageError(f"{flag}: {uri!r} holds a relative part (. or ..), which object stores take literally")
    return join(f"{s3.PREFIX}{bucket}", *parts)


def check_reachable(uri: str, *, flag: str, write: bool = False) -> None:
    """Ask, with short time-outs, whether `uri` can be read (or, with `write`, be written below).

    Raises `UsageError` for what the caller can put right (nothing there, no credentials or none that can be found, no
    such bucket) and `StorageError` for a store that refuses, does not answer (within seconds: its address may be
    wrong), or answers with errors for as long as `persona.retries` lets it.
    """
    if is_s3(uri):
        _check_s3(uri, flag, write)
    elif not write:
        if not Path(uri).exists():
            raise UsageError(f"{flag}: {uri} does not exist")
        if not os.access(uri, os.R_OK):
            raise UsageError(f"{flag}: {uri} cannot be read by this user")
    else:
        there = next(p for p in (Path(uri), *Path(uri).parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"{flag}: {uri} cannot be written: {there} is no folder that this user may write to")


def _check_s3(uri: str, flag: str, write: bool) -> None:
    bucket, key = s3.split(uri)

    def ask() -> dict[str, Any]:
        try:
            if boto3.Session().get_credentials() is None:
                raise UsageError(
                    f"{flag}: {uri} needs credentials and there are none; set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store other than AWS), or run under a role"
                )
            with s3.client(bucket, attempts=_ATTEMPTS, silent_s=_ANSWER_S) as client:
                return dict(client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1))
        except BotoCoreError as error:
            if not is_transient(error):
                # Nobody was asked yet: a profile that is not in the files, half a key, credentials that do not come.
                raise UsageError(
                    f"{flag}: {uri} cannot be asked for: {error}; check the AWS_ variables (AWS_PROFILE, for one) and "
                    "the files in ~/.aws"
                ) from None
            raise StorageError(
                f"{flag}: {s3.where()} does not answer ({type(error).__name__}); check AWS_ENDPOINT_URL and the network"
            ) from None

    try:
        # A store that answers "not now" is there, and is asked again for as long as by any other work.
        found = persistently(ask, f"{flag}: {s3.where()} cannot list {uri}")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        if code == "NoSuchBucket":
            raise UsageError(
                f"{flag}: there is no bucket {bucket!r} at {s3.where()}; create it or correct the name"
            ) from None
        raise StorageError(
            f"{flag}: {s3.where()} refused to list {uri} ({code}); check the key and its rights"
        ) from None
    if not write and not found.get("KeyCount"):
        raise UsageError(f"{flag}: there is nothing at {uri}")


def join(uri: str, *parts: str) -> str:
    """`uri` with the parts behind it, one slash between."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(uri: str) -> bool:
    """Whether there is a file, a folder or any object below `uri`."""
    if not is_s3(uri):
        return Path(uri).exists()
    what = f"cannot look for {uri}"
    if _asked(lambda: s3.size_bytes(uri), what) is not None:
        return True
    return _asked(lambda: any(s3.pages(uri, what=what)), what)


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow filesystem for `uri` and the path in it. Never send it to another process: it holds the secret key.

    It tries again what fails, a few times; what has to get past more than that is to be wrapped in `persistently`.
    A stream that is closed writes what it has: on an error, an incomplete file is there.
    """
    if not is_s3(uri):
        return pafs.LocalFileSystem(), uri
    bucket, key = s3.split(uri)
    return s3.filesystem(bucket), f"{bucket}/{key}".rstrip("/")


def delta_options(uri: str) -> dict[str, str]:
    """Options for `deltalake`: no secret in them; commits use S3's conditional put, so no lock table is needed.

    Requests are tried again for a while, but a commit whose answer is lost is not: it raises, and may have been made.
    """
    return s3.delta_options(uri) if is_s3(uri) else {}


def list_files(uri: str, suffixes: Sequence[str] = ("",)) -> list[FileEntry]:
    """The files at or below `uri` whose names end in one of `suffixes`, sorted.

    Names that begin with `_` or `.` are hidden, and what is below them. A `uri` that is itself a file is listed
    whatever its name; nothing there gives an empty list.
    """
    entries = []
    for name, size_bytes in _listed(uri):
        if not name:
            return [FileEntry(uri=uri, size_bytes=size_bytes)]
        hidden = any(part.startswith(("_", ".")) for part in name.split("/"))
        if not hidden and name.endswith(tuple(suffixes)):
            entries.append(FileEntry(uri=join(uri, name), size_bytes=size_bytes))
    return sorted(entries, key=lambda entry: entry.uri)


def _listed(uri: str) -> Iterator[tuple[str, int]]:
    """Name, relative to `uri`, and size of every file below; a file itself has an empty name."""
    if is_s3(uri):
        what = f"cannot list {uri}"
        own_bytes = _asked(lambda: s3.size_bytes(uri), what)
        if own_bytes is not None:
            yield "", own_bytes
            return
        start = len(s3.split(uri)[1])
        for page in _asked(lambda: list(s3.pages(uri, what=what)), what):
            yield from ((key[start:].lstrip("/"), size_bytes) for key, size_bytes in page)
        return
    filesystem = pafs.LocalFileSystem()
    info = filesystem.get_file_info(uri)
    if info.type == pafs.FileType.File:
        yield "", info.size
        return
    for info in _below(filesystem, uri):
        if info.type == pafs.FileType.File:
            yield info.path[len(uri) :].lstrip("/"), info.size


def _below(filesystem: pafs.LocalFileSystem, uri: str) -> list[pafs.FileInfo]:
    """What lies below a local folder; of one that is made at this moment Arrow says that it is not there, and is."""
    selector = pafs.FileSelector(uri, allow_not_found=True, recursive=True)
    for _ in range(_LISTINGS - 1):
        with contextlib.suppress(FileNotFoundError):
            return list(filesystem.get_file_info(selector))
    return list(filesystem.get_file_info(selector))


def read_bytes(uri: str) -> bytes:
    """The whole of a small file."""
    return _asked(lambda: s3.get(uri) if is_s3(uri) else Path(uri).read_bytes(), f"cannot read {uri}")


def write_bytes(uri: str, data: bytes) -> None:
    """Write a small file so that a reader sees the old bytes or the new ones, never a part."""
    if is_s3(uri):
        _asked(lambda: s3.put(uri, data), f"cannot write {uri}")
        return
    with _draft(Path(uri), data) as draft:
        draft.replace(uri)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a small file only where there is none; False when there is one.

    Of several who try at once, exactly one gets True. Whose answer was lost on the way finds its own bytes there, and
    that counts as well: `data` should name its writer.
    """
    if is_s3(uri):
        return _asked(lambda: s3.create(uri, data), f"cannot write {uri}")
    with _draft(Path(uri), data) as draft:
        try:
            Path(uri).hardlink_to(draft)
        except FileExistsError:
            return False
    return True


def delete(uri: str) -> None:
    """Remove a small file; nothing happens where there is none."""
    if is_s3(uri):
        _asked(lambda: s3.delete(uri), f"cannot delete {uri}")
    else:
        Path(uri).unlink(missing_ok=True)


def copy_folder(source_uri: str, target_uri: str) -> None:
    """Copy the files below `source_uri` to `target_uri`, between disk and object store in any direction.

    A local target appears at once and replaces the former folder; on an object store, where no such thing
    exists, `.json` files are written last, so that whoever finds one finds the rest.
    """
    if is_s3(target_uri):
        _copy_files(source_uri, target_uri)
        return
    target = Path(target_uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _copy_files(source_uri, str(draft))
        draft.chmod(0o755)
        if target.exists():
            shutil.move(target, draft.with_name(f"{draft.name}.old"))
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(draft.with_name(f"{draft.name}.old"), ignore_errors=True)


def _copy_files(source_uri: str, target_uri: str) -> None:
    files = list_files(source_uri)
    if not files:
        raise StorageError(f"there is no folder with files at {source_uri}")
    for file in sorted(files, key=lambda file: (file.uri.endswith(".json"), file.uri)):
        target = join(target_uri, file.uri[len(source_uri) :])
        _asked(functools.partial(_copy_file, file.uri, target), f"cannot copy {file.uri} to {target}")


def _copy_file(source: str, target: str) -> None:
    if is_s3(target):
        if is_s3(source):
            s3.copy(source, target)
        else:
            s3.upload(Path(source), target)
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if is_s3(source):
        s3.download(source, Path(target))
    else:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """The files of a folder as a local path: the folder itself, or a copy for as long as the context is open."""
    if not is_s3(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        _copy_files(uri, folder)
        yield Path(folder)


@contextlib.contextmanager
def _draft(target: Path, data: bytes) -> Iterator[Path]:
    """A file beside `target` with all of its bytes, for as long as the context is open."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(data)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _asked(work: Callable[[], T], what: str) -> T:
    """What `work` gives in the end, or a StorageError that begins with `what`."""
    try:
        return persistently(work, what)
    except (BotoCoreError, ClientError, OSError) as error:
        raise StorageError(f"{what}: {in_one_line(error)}") from error
