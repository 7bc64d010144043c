"""One door to `s3://` and local paths: who wants to read or write anything, asks here for the way in.

Credentials, region and endpoint come from the environment or the machine's role, never from a URI, a flag or
an object that travels between processes: build a filesystem where it is used (a pickled one carries the
secret key in clear).
"""

import contextlib
import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pyarrow.fs as pafs
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from persona.errors import StorageError, UsageError

_S3 = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# What may stand in the path of an S3 URI. Ray and pyarrow send a URI with other characters silently to the
# local disk, or read them as a query; both would be found out much later.
_KEY = re.compile(r"[A-Za-z0-9!_.*'()/=+,:@&$;~-]*")
_COPY_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file that exists: where, and how large."""

    uri: str
    size_bytes: int


def is_s3(uri: str) -> bool:
    """Whether the URI names an object store rather than this machine's disk."""
    return uri.startswith(_S3)


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
    return join(f"{_S3}{bucket}", *parts)


def check_reachable(uri: str, *, flag: str, write: bool = False) -> None:
    """Ask once, with short time-outs, whether `uri` can be read (or, with `write`, be written below).

    Raises `UsageError` for what the caller can put right (nothing there, no credentials, no such bucket) and
    `StorageError` for a store that refuses or does not answer.
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
    bucket, key = _split(uri)
    try:
        if boto3.Session().get_credentials() is None:
            raise UsageError(
                f"{flag}: {uri} needs credentials and there are none; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store other than AWS), or run under a role"
            )
        found = _client(bucket, patient=False).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        if code == "NoSuchBucket":
            raise UsageError(
                f"{flag}: there is no bucket {bucket!r} at {_where()}; create it or correct the name"
            ) from None
        raise StorageError(f"{flag}: {_where()} refused to list {uri} ({code}); check the key and its rights") from None
    except BotoCoreError as error:
        raise StorageError(
            f"{flag}: {_where()} does not answer ({type(error).__name__}); check AWS_ENDPOINT_URL and the network"
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
    filesystem, path = open_filesystem(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow filesystem for `uri` and the path in it. Never send it to another process: it holds the secret key."""
    if not is_s3(uri):
        return pafs.LocalFileSystem(), uri
    bucket, key = _split(uri)
    options: dict[str, Any] = {"region": _region(bucket)}
    if endpoint := _endpoint():
        parts = urlsplit(endpoint)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    return pafs.S3FileSystem(**options), f"{bucket}/{key}".rstrip("/")


def delta_options(uri: str) -> dict[str, str]:
    """Options for `deltalake`: no secret in them; commits use S3's conditional put, so no lock table is needed."""
    if not is_s3(uri):
        return {}
    options = {"AWS_REGION": _region(_split(uri)[0]), "aws_conditional_put": "etag", "connect_timeout": "10s"}
    if endpoint := _endpoint():
        options |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": str(endpoint.startswith("http://")).lower()}
    return options


def list_files(uri: str, suffixes: Sequence[str] = ("",)) -> list[FileEntry]:
    """The files at or below `uri` whose names end in one of `suffixes`, sorted.

    Names that begin with `_` or `.` are hidden, and what is below them. A `uri` that is itself a file is listed
    whatever its name; nothing there gives an empty list.
    """
    filesystem, path = open_filesystem(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [FileEntry(uri=uri, size_bytes=info.size)]
    entries = []
    for info in filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True)):
        name = info.path[len(path) :].lstrip("/")
        hidden = any(part.startswith(("_", ".")) for part in name.split("/"))
        if info.type == pafs.FileType.File and not hidden and name.endswith(tuple(suffixes)):
            entries.append(FileEntry(uri=join(uri, name), size_bytes=info.size))
    return sorted(entries, key=lambda entry: entry.uri)


def read_bytes(uri: str) -> bytes:
    """The whole of a small file."""
    filesystem, path = open_filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read())
    except OSError as error:
        raise StorageError(f"cannot read {uri}: {error}") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a small file so that a reader sees the old bytes or the new ones, never a part."""
    if is_s3(uri):
        bucket, key = _split(uri)
        try:
            _client(bucket).put_object(Bucket=bucket, Key=key, Body=data)
        except (ClientError, BotoCoreError) as error:
            raise StorageError(f"cannot write {uri}: {error}") from error
        return
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(data)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


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
    source, _ = open_filesystem(source_uri)
    target, _ = open_filesystem(target_uri)
    files = list_files(source_uri)
    if not files:
        raise StorageError(f"there is no folder with files at {source_uri}")
    for file in sorted(files, key=lambda file: (file.uri.endswith(".json"), file.uri)):
        path = _path(join(target_uri, file.uri[len(source_uri) :]))
        if not is_s3(target_uri):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with source.open_input_stream(_path(file.uri)) as reader, target.open_output_stream(path) as writer:
                while chunk := reader.read(_COPY_BYTES):
                    writer.write(chunk)
        except OSError as error:
            raise StorageError(f"cannot copy {file.uri} to {target_uri}: {error}") from error


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """The files of a folder as a local path: the folder itself, or a copy for as long as the context is open."""
    if not is_s3(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        _copy_files(uri, folder)
        yield Path(folder)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(_S3).partition("/")
    return bucket, key


def _path(uri: str) -> str:
    return uri.removeprefix(_S3)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _where() -> str:
    endpoint = _endpoint()
    return (urlsplit(endpoint).hostname or "the endpoint") if endpoint else "AWS S3"


def _region(bucket: str) -> str:
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if named:
        return named
    return "us-east-1" if _endpoint() else _configured_region(bucket)


@functools.cache
def _configured_region(bucket: str) -> str:
    try:
        return boto3.Session().region_name or str(pafs.resolve_s3_region(bucket))
    except OSError as error:
        raise StorageError(f"cannot find the region of bucket {bucket!r}; set AWS_REGION ({error})") from error


def _client(bucket: str, *, patient: bool = True) -> Any:
    config = Config(
        connect_timeout=10 if patient else 3,
        read_timeout=60 if patient else 10,
        retries={"mode": "standard", "total_max_attempts": 5 if patient else 2},
    )
    return boto3.client("s3", region_name=_region(bucket), endpoint_url=_endpoint(), config=config)
