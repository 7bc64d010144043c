"""Read, write, list, copy and delete files, on the local disk or on S3.

Transient errors are retried (`persona.storage.retry`): every function that uses an object store either succeeds or
raises `StorageError` within `PERSONA_STORAGE_TIMEOUT_S` per request or file.
"""

import contextlib
import functools
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as pafs
from botocore.exceptions import BotoCoreError, ClientError

from persona.errors import StorageError
from persona.storage import s3
from persona.storage.retry import in_one_line, retry_transient
from persona.storage.uris import is_s3, join

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """An existing file, its size, and a `tag` that changes with its content.

    The tag is the ETag on S3 and the time of modification on disk, as the listing gives them.
    """

    uri: str
    size_bytes: int
    tag: str


def retried(work: Callable[[], T], what: str) -> T:
    """The door to every store: the result of `work`, which is repeated after transient errors.

    Raises `StorageError`, whose message is one line that begins with `what`, for permanent errors and on giving up.
    """
    try:
        return retry_transient(work, what)
    except (BotoCoreError, ClientError, OSError) as error:
        raise StorageError(f"{what}: {in_one_line(error)}") from error


def exists(uri: str) -> bool:
    """Whether `uri` is a file, a folder, or a prefix with at least one object."""
    if not is_s3(uri):
        return Path(uri).exists()
    what = f"cannot look for {uri}"
    if retried(lambda: s3.head(uri), what) is not None:
        return True
    return retried(lambda: any(s3.pages(uri, what=what)), what)


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow filesystem for `uri` and the path in it. Never send it to another process: it holds the secret key.

    It retries a failed request a few times; wrap work that must survive longer outages in `retried`. Closing an output
    stream writes what it has received: after an error, an incomplete file remains.
    """
    if not is_s3(uri):
        return pafs.LocalFileSystem(), uri
    bucket, key = s3.split(uri)
    return s3.filesystem(bucket), f"{bucket}/{key}".rstrip("/")


def delta_options(uri: str) -> dict[str, str]:
    """Options for `deltalake`. They contain no secret; commits use S3's conditional put, so no lock table is needed.

    Requests are retried for a while, except a commit whose response is lost: it raises, and may have succeeded.
    """
    return s3.delta_options(uri) if is_s3(uri) else {}


def list_files(uri: str, suffixes: Sequence[str] = ("",), *, hidden: bool = False) -> list[FileEntry]:
    """The files at or below `uri` whose names end in one of `suffixes`, sorted by URI.

    Files and folders whose names begin with `_` or `.` are skipped unless `hidden`. If `uri` itself is a file, it is
    listed whatever its name. If nothing exists there, the list is empty. Raises `StorageError` for a symbolic link that
    leads nowhere or back to a folder above it, and for a key with `//`.
    """
    entries = []
    for name, size_bytes, tag in _listed(uri):
        if not name:
            return [FileEntry(uri=uri, size_bytes=size_bytes, tag=tag)]
        is_hidden = any(part.startswith(("_", ".")) for part in name.split("/"))
        if (hidden or not is_hidden) and name.endswith(tuple(suffixes)):
            entries.append(FileEntry(uri=join(uri, name), size_bytes=size_bytes, tag=tag))
    return sorted(entries, key=lambda entry: entry.uri)


def _listed(uri: str) -> Iterator[tuple[str, int, str]]:
    """Name relative to `uri`, size and tag of every file below it; the name is empty if `uri` itself is a file."""
    if is_s3(uri):
        what = f"cannot list {uri}"
        own = retried(lambda: s3.head(uri), what)
        if own is not None:
            yield "", *own
            return
        start = len(s3.split(uri)[1])
        for page in retried(lambda: list(s3.pages(uri, what=what)), what):
            for key, size_bytes, tag in page:
                if "//" in key:
                    raise StorageError(
                        f"the key {key!r} below {uri} has an empty part, which Arrow cannot read; rename it"
                    )
                yield key[start:].lstrip("/"), size_bytes, tag
        return
    if Path(uri).is_file():
        yield "", *_size_and_tag(Path(uri).stat())
        return
    try:
        yield from _below(uri, "", ())
    except OSError as error:
        raise StorageError(f"cannot list {uri}: {in_one_line(error)}") from error


def _below(folder: str, name: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int, str]]:
    """Name, size and tag of each file below a local folder, which has the relative `name`.

    `above` identifies the folders that lead here, to find links that would go round in circles. A folder or file that
    disappears during the call is left out.
    """
    try:
        own = Path(folder).stat()
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        inner = f"{name}{entry.name}"
        try:
            found = entry.stat()
        except OSError as error:
            if entry.is_symlink():
                raise StorageError(f"{entry.path} is a symbolic link that leads to no file or folder") from error
            if isinstance(error, FileNotFoundError):
                continue
            raise
        if entry.is_symlink() and (found.st_dev, found.st_ino) in (*above, (own.st_dev, own.st_ino)):
            raise StorageError(f"{entry.path} is a symbolic link to a folder that contains it; remove it")
        if stat.S_ISDIR(found.st_mode):
            yield from _below(entry.path, f"{inner}/", (*above, (own.st_dev, own.st_ino)))
        elif stat.S_ISREG(found.st_mode):
            yield inner, *_size_and_tag(found)


def _size_and_tag(found: os.stat_result) -> tuple[int, str]:
    return found.st_size, f"mtime_ns:{found.st_mtime_ns}"


def read_bytes(uri: str) -> bytes:
    """The content of a small file."""
    return retried(lambda: s3.get(uri) if is_s3(uri) else Path(uri).read_bytes(), f"cannot read {uri}")


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start` on. Raises `StorageError` if the file is shorter."""

    def read() -> bytes:
        if is_s3(uri):
            return s3.get_range(uri, start, length)
        with Path(uri).open("rb") as file:
            file.seek(start)
            return file.read(length)

    data = retried(read, f"cannot read {uri}")
    if len(data) != length:
        raise StorageError(f"{uri} has only {len(data):,} of {length:,} bytes from byte {start:,} on")
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a small file atomically: a reader sees the old content or the new, never a part."""
    if is_s3(uri):
        retried(lambda: s3.put(uri, data), f"cannot write {uri}")
        return

    def replace() -> None:
        with _draft(Path(uri), data) as draft:
            draft.replace(uri)

    retried(replace, f"cannot write {uri}")


@contextlib.contextmanager
def write_file(uri: str) -> Iterator[Path]:
    """A local path for a large file that is written piece by piece; needs free disk space for it.

    When the context ends without an error, the file appears at `uri`, whole or not at all. Errors of the body pass
    unchanged and leave nothing behind.
    """
    if is_s3(uri):
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / "draft"
            yield draft
            retried(lambda: s3.upload(draft, uri), f"cannot write {uri}")
        return
    with _draft(Path(uri), b"") as draft:
        yield draft
        retried(lambda: draft.replace(uri), f"cannot write {uri}")


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a small file unless it exists; returns whether it was written.

    Of several concurrent writers, exactly one gets True. When the response to a write is lost, finding the same bytes
    counts as success, so `data` must be unique to its writer.
    """
    if is_s3(uri):
        return retried(lambda: s3.create(uri, data), f"cannot write {uri}")

    def link() -> bool:
        with _draft(Path(uri), data) as draft:
            try:
                Path(uri).hardlink_to(draft)
            except FileExistsError:
                return False
        return True

    return retried(link, f"cannot write {uri}")


def age_s(uri: str) -> float | None:
    """Seconds since a file was written, by the clock of its store. None if it does not exist, or the clock is unknown.

    The clock of this machine has no part in it: on a network disk, times are the server's.
    """
    what = f"cannot tell the age of {uri}"
    if is_s3(uri):
        return retried(lambda: s3.age_s(uri), what)

    def against_a_new_file() -> float | None:
        try:
            with _draft(Path(uri), b"") as draft:
                return draft.stat().st_mtime - Path(uri).stat().st_mtime
        except FileNotFoundError:
            return None

    return retried(against_a_new_file, what)


def delete(uri: str) -> None:
    """Delete a small file if it exists."""
    retried(lambda: s3.delete(uri) if is_s3(uri) else Path(uri).unlink(missing_ok=True), f"cannot delete {uri}")


def copy_folder(source_uri: str, target_uri: str) -> None:
    """Copy the files below `source_uri` to `target_uri`, between disk and object store in any direction.

    A local target appears whole: the copy is made next to it and then takes its place. An object store has no such
    operation, so `.json` files are written last: a reader that finds one also finds the other files.
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
        raise StorageError(f"no files to copy at {source_uri}")
    for file in sorted(files, key=lambda file: (file.uri.endswith(".json"), file.uri)):
        target = join(target_uri, file.uri[len(source_uri) :])
        retried(functools.partial(_copy_file, file.uri, target), f"cannot copy {file.uri} to {target}")


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
    """A folder as a local path: the folder itself, or a copy that is deleted when the context ends."""
    if not is_s3(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        _copy_files(uri, folder)
        yield Path(folder)


@contextlib.contextmanager
def _draft(target: Path, data: bytes) -> Iterator[Path]:
    """A temporary file in the folder of `target` that holds `data`; deleted when the context ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(data)
        yield draft
    finally:
        draft.unlink(missing_ok=True)
