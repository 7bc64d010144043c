"""A pointer: a folder that names the store to use, so that one small write moves every job to another store.

    <pointer>/_current.json    the store in use, since when, and the stores that were in use before

The named folder must be a store itself, so pointers cannot form a chain or a loop.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from persona import storage
from persona.errors import InputError, UsageError

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """The content of `_current.json`. `earlier` are the other stores that were in use, the latest first."""

    store: str
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    earlier: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for values that no pointer can have."""
        for uri in self.stores:
            try:
                checked = storage.check_uri(uri, flag="store")
            except UsageError as error:
                raise ValueError(str(error)) from error
            if checked != uri:
                raise ValueError(f"{uri!r} is not a URI in normal form")
        if len(set(self.stores)) != len(self.stores):
            raise ValueError("it names a store twice")
        datetime.fromisoformat(self.since)

    @property
    def stores(self) -> tuple[str, ...]:
        """The store in use and the earlier ones."""
        return (self.store, *self.earlier)

    def switched(self, store: str) -> "Pointer":
        """The pointer to another store, now."""
        return Pointer(store=store, earlier=tuple(uri for uri in self.stores if uri != store))


def read(folder: str) -> Pointer | None:
    """The pointer in a folder; None when there is none. Raises `InputError` when its file cannot be read as one."""
    uri = _uri(folder)
    if not storage.exists(uri):
        return None
    try:
        return _parse(json.loads(storage.read_bytes(uri)))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{uri} is not a valid pointer to a store ({error}); restore it, or delete it and write a new one with: "
            f"python -m jobs.store switch --store {folder} --to STORE"
        ) from error


def write(folder: str, pointer: Pointer) -> None:
    """Replace the pointer in a folder, atomically."""
    storage.write_bytes(_uri(folder), json.dumps({"format": _FORMAT, **asdict(pointer)}, indent=2).encode())


def _parse(content: Any) -> Pointer:
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("it is not a JSON object with a format")
    if content["format"] != _FORMAT:
        raise ValueError(f"it has format {content['format']!r}, this version of persona-plug reads format {_FORMAT}")
    if content.keys() != {"format", *(part.name for part in fields(Pointer))}:
        raise ValueError(f"it has the fields {', '.join(content)}")
    store, since, earlier = content["store"], content["since"], content["earlier"]
    if not isinstance(earlier, list) or not all(isinstance(text, str) for text in (store, since, *earlier)):
        raise ValueError("a value has a wrong type")
    return Pointer(store=store, since=since, earlier=tuple(earlier))


def _uri(folder: str) -> str:
    return storage.join(folder, "_current.json")
