"""Access to `s3://` URIs and local paths: the project does all its file I/O through this package.

Credentials, region and endpoint come from the environment or the machine's role, never from a URI, a flag or a pickled
object. Create a filesystem in the process that uses it: a pickled one contains the secret key in plain text.
"""

from persona.storage.files import (
    FileEntry,
    age_s,
    copy_folder,
    create_bytes,
    delete,
    delta_options,
    exists,
    list_files,
    local_folder,
    open_filesystem,
    read_bytes,
    read_range,
    retried,
    write_bytes,
    write_file,
)
from persona.storage.reach import check_reachable
from persona.storage.uris import check_uri, is_s3, join

__all__ = [
    "FileEntry",
    "age_s",
    "check_reachable",
    "check_uri",
    "copy_folder",
    "create_bytes",
    "delete",
    "delta_options",
    "exists",
    "is_s3",
    "join",
    "list_files",
    "local_folder",
    "open_filesystem",
    "read_bytes",
    "read_range",
    "retried",
    "write_bytes",
    "write_file",
]
