"""The table `profiles`: what users prefer, in words and in demonstrations, made from their preference pairs."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from persona.errors import InputError
from persona.storage import join
from persona.store.store import Store
from persona.store.table import Table

NAME = "profiles"
# What a request needs to know of a profile.
_COLUMNS = ("user_id", "newest_pair_at", "text", "demonstrations")


def require(store: Store, recipe: str) -> None:
    """Raises InputError when no user has a profile of this recipe; reads no data file."""
    table = Table.find(join(store.uri, NAME), NAME)
    recipes = [] if table is None else table.partitions()
    if recipe not in recipes:
        there_are = f"there are {', '.join(recipes)}" if recipes else "there are none at all"
        raise InputError(
            f"--user-profile {recipe}: no profiles of this recipe in {store.label}; {there_are}. Make them with "
            f"python -m jobs.profile --store {store.label} --recipe {recipe} ..."
        )


def fingerprints(store: Store, bucket: int, recipe: str, users: Sequence[str]) -> dict[str, str]:
    """The fingerprint of the profile of each of these users of a bucket who has one."""
    found = _read(store, bucket, recipe, users, ["user_id", "fingerprint"])
    return dict(zip(found["user_id"].to_pylist(), found["fingerprint"].to_pylist(), strict=True))


def of_users(store: Store, bucket: int, recipe: str, users: Sequence[str]) -> pa.Table:
    """The profiles of these users of a bucket: user_id, newest_pair_at, text, demonstrations."""
    return _read(store, bucket, recipe, users, _COLUMNS)


def _read(store: Store, bucket: int, recipe: str, users: Sequence[str], columns: Sequence[str]) -> pa.Table:
    values: dict[str, Sequence[Any]] = {"bucket": [bucket], "user_id": sorted(set(users))}
    return store.table(NAME).read(columns, partitions=[recipe], values=values)
