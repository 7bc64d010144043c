"""The files of a job that writes requests: a fixed number of parts, so that the same command writes the same files."""

from collections.abc import Sequence

from persona.errors import UsageError


def part_uri(out: str, number: int, n_parts: int, *, folder: str = "") -> str:
    """The URI of one of the files, below `out` or in a folder there."""
    from persona import storage

    names = [folder] if folder else []
    return storage.join(out, *names, f"part-{number:05}-of-{n_parts:05}.parquet")


def check_only_parts(out: str, n_parts: int, folders: Sequence[str] = ("",)) -> None:
    """Raises UsageError for a folder with files of another run: readers of the folder would see their requests, too."""
    from persona import storage

    ours = {part_uri(out, number, n_parts, folder=folder) for folder in folders for number in range(n_parts)}
    others = [entry.uri for entry in storage.list_files(out) if entry.uri not in ours]
    if others:
        raise UsageError(f"--out {out}: has files that this run would not replace ({others[0]}); give an empty folder")
