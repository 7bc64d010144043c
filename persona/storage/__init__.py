"""One door to `s3://` and local paths: every read and write of this project goes through here.

Credentials, region and endpoint come from the environment or the machine's role, never from a URI, a flag or an object
that travels between processes: build a filesystem where it is used (a pickled one carries the secret key in clear).
"""

from persona.storage.files import (
    FileEntry,
    copy_folder,
    create_bytes,
    delete,
    delta_options,
    exists,
    list_files,
    local_folder,
    open_filesystem,
    read_bytes,
    write_bytes,
    write_file,
)
from persona.storage.reach import check_reachable
from persona.storage.uris import check_uri, is_s3, join

__all__ = [
    "FileEntry",
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
    "write_bytes",
    "write_file",
]
