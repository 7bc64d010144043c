"""The folders of run files, `<root>/_exchange/<writer>-<run id>/`, and the deletion of those that killed runs left.

The writer is the table whose lease a run holds, so the next holder of the lease may delete what it finds.
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

    Only for a caller that no such run can be at work with: it holds the lease of the table `writer`, or of all tables.
    """
    prefix = "" if writer is None else f"{writer}-"
    base = storage.join(root, FOLDER)
    if not storage.is_s3(root):
        found = [path for path in Path(base).glob(f"{prefix}*") if path.is_dir()]
        return sum(delete_folder(str(path)) for path in found) + _remove_empty(Path(base))
    files = [file.uri for file in storage.list_files(base, hidden=True)]
    mine = [uri for uri in files if uri.removeprefix(storage.join(base, "")).startswith(prefix)]
    with ThreadPoolExecutor(_PARALLEL_DELETES) as pool:
        list(pool.map(storage.delete, mine))
    return len(mine)


def _remove_empty(folder: Path) -> int:
    """Remove a local folder, and the one above it, if they are empty. Returns 0, the number of files deleted."""
    for path in (folder, folder.parent):
        try:
            if FOLDER in (path.name, path.parent.name):
                path.rmdir()
        except OSError:
            break
    return 0
