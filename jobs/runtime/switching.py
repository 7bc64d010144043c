"""Point a folder to another store, once that store has the same behaviors as the one in use."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime import exchange, session
from persona.errors import InputError, LeaseLost, StoreMismatch, UsageError

if TYPE_CHECKING:
    from persona.store.comparison import Comparison
    from persona.store.pointer import Pointer
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A pointer (a folder), the store that it is to name, and the pointer as it is; None for a new one."""

    pointer: str
    new: "Store"
    current: "Pointer | None"

    @property
    def is_needed(self) -> bool:
        """Whether the pointer names another store, or none."""
        return self.current is None or self.current.store != self.new.uri


def plan(folder: str, to: str) -> Switch:
    """Check both folders. Raises UsageError when the first is a store, or the second is a pointer."""
    from persona.storage import join
    from persona.store import pointer as pointers
    from persona.store.store import Store
    from persona.store.table import Table

    if Table.find(join(folder, "behaviors"), "behaviors") is not None:
        raise UsageError(
            f"--store {folder}: is a store, and readers of its tables would not follow a pointer; give a folder of "
            "its own for the pointer, which the jobs then get as --store"
        )
    new = Store.open(to)
    if new.pointer is not None:
        raise UsageError(f"--to {to}: is a pointer to {new.uri}; give --to the store itself")
    return Switch(pointer=folder, new=new, current=pointers.read(folder))


def compare(switch: Switch, *, allow_differences: bool) -> "Comparison | None":
    """Compare the behaviors of the store in use with those of the new one; None when no store is in use.

    With `allow_differences` the store in use may be gone. Raises InputError otherwise.
    """
    from persona.store import comparison
    from persona.store.store import Store

    if switch.current is None:
        return None
    try:
        old = Store.open(switch.current.store)
    except InputError as error:
        if allow_differences:
            return None
        raise InputError(
            f"{switch.pointer} points to {switch.current.store}, which cannot be compared with {switch.new.uri}: "
            f"{error}. To switch without a comparison, add --allow-differences"
        ) from error
    session.connect()
    stores = {"old": old.snapshot("behaviors"), "new": switch.new.snapshot("behaviors")}
    return comparison.added(exchange.results(comparison.groups(**stores), comparison.compare, **stores))


def require_equal(found: "Comparison", switch: Switch) -> None:
    """Raises StoreMismatch when the stores do not have the same behaviors."""
    if found.is_equal or switch.current is None:
        return
    parts = [
        (found.missing, f"{found.missing:,} are missing there"),
        (found.extra, f"{found.extra:,} are only there"),
        (found.differing, f"{found.differing:,} have another text or timestamp there"),
    ]
    differences = ", ".join(text for n, text in parts if n)
    raise StoreMismatch(
        f"--to {switch.new.uri} has {found.new:,} behaviors and {switch.current.store}, now in use, has {found.old:,}: "
        f"{differences}. Run jobs.embed on the same histories into both, and on the new one jobs.forget for the users "
        "who were forgotten in the old one; --differences FILE lists them, --allow-differences switches anyway"
    )


def write_differences(found: "Comparison", uri: str) -> None:
    """Write examples of behaviors that are not the same in both stores, as JSON lines."""
    from persona import storage

    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found.examples.to_pylist()]
    storage.write_bytes(uri, "".join(lines).encode())


def write(switch: Switch) -> None:
    """Point the folder to the new store, in one atomic write. Raises LeaseHeld or LeaseLost for concurrent switches."""
    from persona.store import pointer as pointers
    from persona.store.lease import Lease

    with Lease.acquire(switch.pointer, "pointer", job="jobs.store") as lease:
        if pointers.read(switch.pointer) != switch.current:
            raise LeaseLost(f"another run has switched {switch.pointer} meanwhile; run the same command again")
        lease.check()
        old = switch.current
        new = pointers.Pointer(store=switch.new.uri) if old is None else old.switched(switch.new.uri)
        pointers.write(switch.pointer, new)


def facts(switch: Switch, found: "Comparison | None") -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Rows and fields of the summary."""
    from persona.store import maintenance

    before = None if switch.current is None else switch.current.store
    n_answers = maintenance.facts(switch.new, "generations")["rows"]
    rows = [
        ("points to", switch.new.uri),
        ("before", before or "nothing"),
        ("encoder", f"{switch.new.identity.encoder}, width {switch.new.identity.width}"),
        ("answers", f"{n_answers:,} in the new store"),
    ]
    result: dict[str, Any] = {"to": switch.new.uri, "before": before, "answers": n_answers}
    if found is not None:
        counts = {name: getattr(found, name) for name in ("missing", "extra", "differing")}
        rows.append(("behaviors", f"{found.new:,}, {', '.join(f'{n:,} {name}' for name, n in counts.items())}"))
        result |= {"behaviors": found.new, **counts}
    return rows, result
