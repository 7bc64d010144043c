"""Read, write, list, copy and delete files, on the local disk or on S3.

Transient errors are retried (`persona.storage.retry`): every function here that asks an object store succeeds, or
raises `StorageError` within `PERSONA_STORAGE_TIMEOUT_S` for each request or file.
"""

import contextlib
import functools
import shutil
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
    """A file that exists: where, and how large."""

    uri: str
    size_bytes: int


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

    It tries again what fails, a few times; what has to get past more than that is to be wrapped in `retry_transient`.
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
    """The entries below a local folder; an empty list where there is no folder."""
    selector = pafs.FileSelector(uri, allow_not_found=True, recursive=True)
    # Despite `allow_not_found`, Arrow raises for a folder that appears or disappears during the call.
    return retry_transient(
        lambda: list(filesystem.get_file_info(selector)),
        f"cannot list {uri}",
        is_transient=lambda error: isinstance(error, FileNotFoundError),
        give_up_s=5.0,
        pauses_s=(0.0001, 0.1),
    )


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
        return retry_transient(work, what)
    except (BotoCoreError, ClientError, OSError) as error:
        raise StorageError(f"{what}: {in_one_line(error)}") from error
