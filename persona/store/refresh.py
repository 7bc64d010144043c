"""Decide what a refresh has to read: compare the files of an input with the ledger of those read before.

Reading only new files is exact if every row they do not have is where it was. So all files are read again if one of
them has changed: its old rows cannot be told from those of other files. The same holds if files have gone and others
have come in their place, and with `sync` if the store may have rows that the input no longer has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from posixpath import dirname

from persona.inputs.files import InputFiles
from persona.storage import FileEntry
from persona.store.sources import Ledger, Source


@dataclass(frozen=True, kw_only=True)
class FileRead:
    """What a run has read of a file: valid rows, rejects, and whether it need not be read again."""

    rows: int
    rejects: int
    is_whole: bool


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """The files of an input, compared with the ledger.

    Attributes:
        new: never read, or not to the end; changed: read with another content; known: read as they are.
        gone: read before, and no longer in the input; moved: the same, but other files have their rows.
        others: read before, and excluded now or found with another input only.
        why_all: why files are read although they are known; empty if they are not read.
        limited: whether only the first rows are read.
        sync: whether rows that the input does not have are to be deleted.
    """

    new: Sequence[FileEntry]
    changed: Sequence[FileEntry]
    known: Sequence[FileEntry]
    gone: Sequence[Source]
    moved: Sequence[Source]
    others: Sequence[Source]
    why_all: str
    limited: bool
    sync: bool

    @property
    def to_read(self) -> list[FileEntry]:
        """The files to read."""
        return [*self.new, *self.changed, *(self.known if self.why_all else ())]

    @property
    def reads_all(self) -> bool:
        """Whether all rows of the input are read."""
        return not self.limited and (bool(self.why_all) or not self.known)

    @property
    def deletes(self) -> bool:
        """Whether stored rows that are not read are to be deleted."""
        return self.sync and self.reads_all

    @property
    def keeps_later(self) -> bool:
        """Whether a stored row may be of a file that is not read now, and so stays if it is later than the one read."""
        return self.limited or bool(not self.why_all and (self.known or self.others))


def compare(
    files: InputFiles,
    ledger: Ledger,
    read_as: str,
    *,
    sync: bool = False,
    reread: bool = False,
    limited: bool = False,
    only_gained_rows: bool = False,
) -> Refresh:
    """What to read of an input.

    Args:
        files: The input.
        ledger: What has been read.
        read_as: The digest of the settings the input is read with.
        sync: Read everything if the store may have rows that the input no longer has.
        reread: Read everything in any case.
        limited: The run takes the first rows of all files, whether they are known or not.
        only_gained_rows: The input is a table that has gained rows and lost none since the last run.
    """
    read: dict[str, list[Source]] = {}
    for source in ledger.sources:
        read.setdefault(source.uri, []).append(source)
    new: list[FileEntry] = []
    changed: list[FileEntry] = []
    matches: dict[FileEntry, Source] = {}
    for file in files.formats:
        of_content = [one for one in read.get(file.uri, ()) if (one.size_bytes, one.tag) == (file.size_bytes, file.tag)]
        if of_content:
            matches[file] = max(of_content, key=lambda one: (one.epoch == ledger.epoch, one.read_as == read_as))
        else:
            (changed if file.uri in read else new).append(file)
    listed = {file.uri for file in files.formats}
    unlisted = [one for one in ledger.sources if one.uri not in listed]
    is_gone = [one.input == files.uri and one.uri not in files.excluded for one in unlisted]
    gone = [one for one, is_one in zip(unlisted, is_gone, strict=True) if is_one]
    refresh = Refresh(
        new=new,
        changed=changed,
        known=list(matches),
        gone=[] if only_gained_rows else gone,
        moved=gone if only_gained_rows else [],
        others=[one for one, is_one in zip(unlisted, is_gone, strict=True) if not is_one],
        why_all="",
        limited=limited,
        sync=sync,
    )
    why_all = "--reread" if reread else _why_all(refresh, list(matches.values()), files, ledger, read_as)
    return replace(refresh, why_all="--limit takes the first rows of all files" if limited else why_all)


def _why_all(refresh: Refresh, matches: Sequence[Source], files: InputFiles, ledger: Ledger, read_as: str) -> str:
    """Why reading the new files does not suffice; empty if it does."""
    if any(source.epoch != ledger.epoch for source in matches):
        return "another program has written to the table behaviors"
    if n_otherwise := sum(source.read_as != read_as for source in matches):
        return f"{n_otherwise:,} files were read with other settings, or by another version of this program"
    if refresh.changed:
        return f"{len(refresh.changed):,} files have changed, and their old rows cannot be told from those of others"
    folders = {dirname(file.uri) for file in refresh.new}
    replaced = [one for one in refresh.gone if (files.table and folders) or dirname(one.uri) in folders]
    if replaced:
        return f"{len(replaced):,} files have gone where new ones have come, which may replace them"
    if refresh.sync and refresh.gone:
        return f"{len(refresh.gone):,} files have gone, and --sync deletes what only they had"
    if refresh.sync and refresh.others:
        return f"{len(refresh.others):,} files of other inputs are in the store, and --sync deletes what only they have"
    if refresh.sync and not ledger.is_exact:
        return "the store may have behaviors of other runs, which --sync deletes"
    return ""


def before_deleting(refresh: Refresh, ledger: Ledger) -> list[Source]:
    """The sources that remain when rows that the input does not have are about to be deleted.

    Commit them first: otherwise a run that is killed while it deletes would leave files that count as read and whose
    rows are no longer there.
    """
    removed = {(one.input, one.uri) for one in (*refresh.gone, *refresh.others)}
    return [one for one in ledger.sources if (one.input, one.uri) not in removed]


def after_reading(
    refresh: Refresh,
    files: InputFiles,
    ledger: Ledger,
    found: Mapping[str, FileRead],
    *,
    read_as: str,
    run: str,
    now: datetime,
    version: int,
    has_deleted: bool,
) -> list[Source]:
    """The sources after a run that has committed all rows it read.

    Args:
        refresh: What was to be read.
        files: The input.
        ledger: The ledger before the run.
        found: What was read, by file.
        read_as: The digest of the settings.
        run: Id of the run.
        now: Time of the commit.
        version: The version of `behaviors` that has the rows.
        has_deleted: Whether all rows that the input does not have were deleted.
    """
    if refresh.limited or not refresh.to_read:
        return list(ledger.sources)
    kept = before_deleting(refresh, ledger) if has_deleted else list(ledger.sources)
    if refresh.reads_all:
        # A gone file has no say in later refreshes; that the store may have its rows is told by `exact_version`.
        gone = {(one.input, one.uri) for one in refresh.gone}
        kept = [one for one in kept if (one.input, one.uri) not in gone]
    uris = {file.uri for file in refresh.to_read} | {one.uri for one in refresh.moved}
    kept = [one for one in kept if one.uri not in uris]
    whole = [file for file in refresh.to_read if (one := found.get(file.uri)) is not None and one.is_whole]
    leaves_rows = bool(refresh.why_all) or (refresh.reads_all and bool(refresh.gone))
    is_exact = len(whole) == len(refresh.to_read) and (has_deleted or (ledger.is_exact and not leaves_rows))
    added = [
        Source(
            input=files.uri,
            uri=file.uri,
            size_bytes=file.size_bytes,
            tag=file.tag,
            table_version=files.table.number if files.table else None,
            read_as=read_as,
            rows=found[file.uri].rows,
            rejects=found[file.uri].rejects,
            run=run,
            read_at=now,
            epoch=ledger.epoch,
            exact_version=version if is_exact else None,
        )
        for file in whole
    ]
    return [*kept, *added]
