"""The folders of run files, `<root>/_exchange/<writer>-<run id>/`, and the deletion of those that killed runs left.

A writer is what only one run at a time can be: below a store the table whose lease the run holds, elsewhere the job
that writes to the folder.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from persona import storage

FOLDER = "_exchange"
_PARALLEL_DELETES = 16


def new_folder(root: str, writer: str) -> str:
    """A folder for the run files of one run, which does not exist yet."""
    return storage.join(root, FOLDER, f"{writer}-{uuid.uuid4().hex}")


def delete_folder(uri: str) -> int:
    """Delete all files of a folder; returns their number. Raises `StorageError`."""
    files = [file.uri for file in storage.list_files(uri, hidden=True)]
    with ThreadPoolExecutor(_PARALLEL_DELETES) as pool:
        list(pool.map(storage.delete, files))
    if not storage.is_s3(uri):
        _remove_empty(Path(uri))
    return len(files)


def delete_leftovers(root: str, writer: str | None = None) -> int:
    """Delete the run files that earlier runs of a writer, or of all, have left below `root`; returns their number.

    Only for a caller that no such run can be at work with.
    """
    base = storage.join(root, FOLDER)
    names = {_folder(file.uri, base) for file in storage.list_files(base, hidden=True)}
    mine = sorted(name for name in names if writer is None or name.rpartition("-")[0] == writer)
    return sum(delete_folder(storage.join(base, name)) for name in mine)


def _folder(uri: str, base: str) -> str:
    return uri.removeprefix(storage.join(base, "")).partition("/")[0]


def _remove_empty(folder: Path) -> None:
    """Remove a local folder, and the one above it, if they are empty."""
    for path in (folder, folder.parent):
        try:
            if FOLDER in (path.name, path.parent.name):
                path.rmdir()
        except OSError:
            break
