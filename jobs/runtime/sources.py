"""Which files of its input a run reads: decided by the ledger of files read before, and recorded there afterwards."""

import posixpath
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jobs.runtime.job_options import InputFormat
from jobs.runtime.reading import Found

if TYPE_CHECKING:
    from persona.inputs.files import InputFiles
    from persona.inputs.histories import Columns
    from persona.store.refresh import Refresh
    from persona.store.sources import Ledger
    from persona.store.store import Store
    from persona.store.writer import Writer

_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides which files are read besides the ledger, see `persona.store.refresh.compare`."""

    sync: bool = False
    reread: bool = False
    limited: bool = False


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The files of an input, those of them to read, and the ledger that says so."""

    files: "InputFiles"
    read_as: str
    ledger: "Ledger"
    refresh: "Refresh"
    options: Options

    def again(self, store: "Store") -> "Planned":
        """The same by the ledger as of now, for the holder of the lease: another run may have ended in between."""
        from persona.store import sources

        now = sources.read(store)
        # Taking the lease has made a new version of `behaviors`.
        ledger = replace(now, is_exact=self.ledger.is_exact and list(now.sources) == list(self.ledger.sources))
        refresh = _compared(self.files, ledger, self.read_as, self.options)
        return replace(self, ledger=ledger, refresh=refresh)

    def before_deleting(self, writer: "Writer") -> "Planned":
        """Strike out the files whose rows may be deleted; commit nothing of `behaviors` before."""
        from persona.store import refresh, sources

        left = refresh.before_deleting(self.refresh, self.ledger)
        sources.write(writer, self.ledger, left)
        return replace(self, ledger=replace(self.ledger, sources=left))

    def record(
        self, writer: "Writer", found: Found, *, run: str, version: int, has_deleted: bool, max_reject_fraction: float
    ) -> None:
        """Record the files that were read whole; only once all rows are committed, in this version of `behaviors`.

        If too many rows are bad, files with rejects are not recorded, so that the same command again fails again.
        """
        from persona.store import refresh, sources

        fails = bool(found.exit_code(max_reject_fraction))
        files = {
            uri: refresh.FileRead(
                rows=one.rows, rejects=one.rejects, is_whole=not (one.unreadable or (fails and one.rejects))
            )
            for uri, one in found.files.items()
        }
        after = refresh.after_reading(
            self.refresh,
            self.files,
            self.ledger,
            files,
            read_as=self.read_as,
            run=run,
            now=datetime.now(UTC),
            version=version,
            has_deleted=has_deleted,
        )
        sources.write(writer, self.ledger, after)

    def rows(self) -> list[tuple[str, str]]:
        """The rows of a summary, or of a dry run."""
        table = [("input", str(self.files.table))] if self.files.table else []
        counted = [
            (f"{name} files", _described(n_bytes, uris, self.files.uri))
            for name, (n_bytes, uris) in self._by_state().items()
            if uris or name in ("new", "known")
        ]
        all_files = [("reads all files", self.refresh.why_all)] if self.refresh.why_all else []
        return [*table, *counted, *all_files]

    def facts(self) -> dict[str, Any]:
        """The same for programs."""
        to_read = self.refresh.to_read
        return {
            "input_version": self.files.table.number if self.files.table else None,
            "input_files": {
                name: {"files": len(uris), "bytes": n_bytes} for name, (n_bytes, uris) in self._by_state().items()
            },
            "files": len(to_read),
            "bytes": sum(file.size_bytes for file in to_read),
            "reads_all": self.refresh.why_all,
        }

    def _by_state(self) -> dict[str, tuple[int, list[str]]]:
        """Bytes and URIs of the files in each state."""
        states = {name: getattr(self.refresh, name) for name in ("new", "changed", "known", "gone")}
        return {
            name: (sum(one.size_bytes for one in files), [one.uri for one in files]) for name, files in states.items()
        }


def plan(
    files: "InputFiles", columns: "Columns", form: InputFormat, store: "Store | None", options: Options
) -> Planned:
    """What to read of an input that is read with these settings. Without a store no file is known."""
    from persona.store import sources

    ledger = sources.Ledger() if store is None else sources.read(store)
    settings = {**asdict(form), **asdict(columns)}
    del settings["exclude"]  # it chooses files, and says nothing about their rows
    read_as = sources.digest(settings)
    refresh = _compared(files, ledger, read_as, options)
    return Planned(files=files, read_as=read_as, ledger=ledger, refresh=refresh, options=options)


def _compared(files: "InputFiles", ledger: "Ledger", read_as: str, options: Options) -> "Refresh":
    from persona.inputs.files import only_gained_rows
    from persona.store.refresh import compare

    compared = compare(files, ledger, read_as, **asdict(options))
    if not (files.table and compared.gone and compared.new):
        return compared
    # The newest version that was read: the last run may have found nothing new in later ones.
    last = max((one for one in ledger.sources if one.input == files.uri), key=lambda one: one.read_at)
    if last.table_version is None or not only_gained_rows(files, last.table_version, flag="--histories"):
        return compared
    return compare(files, ledger, read_as, **asdict(options), only_gained_rows=True)


def _described(n_bytes: int, uris: Sequence[str], root: str) -> str:
    if not uris:
        return "none"
    names = [uri.removeprefix(root).lstrip("/") or posixpath.basename(uri) for uri in uris[:_NAMES_SHOWN]]
    more = f" and {len(uris) - _NAMES_SHOWN:,} more" if len(uris) > _NAMES_SHOWN else ""
    return f"{len(uris):,} files, {n_bytes:,} bytes: {', '.join(names)}{more}"
