"""A pointer to a store: opened like the store, switched by one atomic write, never a chain, checked on reading."""

import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from persona import open_store, storage
from persona.errors import InputError, StoreMismatch
from persona.storage import join
from persona.store import pointer as pointers
from persona.store.pointer import Pointer
from persona.store.store import Store
from tests.stores import IDENTITY, behaviors, everything, refresh

NEWER = replace(IDENTITY, encoder="newer", fingerprint="beef")


@pytest.fixture
def live(root: str) -> str:
    """A pointer to the store `v1`, beside an empty store `v2` of another encoder."""
    Store.create(join(root, "v1"), IDENTITY, 4)
    Store.create(join(root, "v2"), NEWER, 8)
    pointers.write(join(root, "live"), Pointer(store=join(root, "v1")))
    return join(root, "live")


def test_opening_a_pointer_opens_the_store_that_it_names(live: str, root: str) -> None:
    first, second = join(root, "v1"), join(root, "v2")
    store = open_store(live)
    assert (store.uri, store.pointer, store.label) == (first, live, f"{first} (via {live})")
    found = Store.find(live, IDENTITY)
    assert found is not None and refresh(found, behaviors(("a", "1", "x", 1)))["new"] == 1
    assert everything(Store.open(first)) == everything(Store.open(live)) == [("a", "1", 1)]
    assert pickle.loads(pickle.dumps(store.snapshot("behaviors"))).label == store.label

    pointers.write(live, Pointer(store=first).switched(second))
    assert Store.open(live).uri == second
    assert store.uri == first, "an open store stays the one that it is"
    with pytest.raises(StoreMismatch, match=f"the store at {second} was made by encoder newer"):
        Store.find(live, IDENTITY)
    assert storage.list_files(live) == [], "a table in the folder of the pointer would hide it"
    assert [store.uri for store in Store.open_all(live)] == [second, first]
    assert [store.uri for store in Store.open_all(first)] == [first]


def test_a_pointer_to_a_pointer_or_to_nothing_is_refused(live: str, root: str) -> None:
    for target in (live, join(root, "nothing")):
        pointers.write(join(root, "other"), Pointer(store=target))
        with pytest.raises(InputError, match=f"points to {target}, where there is no store; point it to one with"):
            Store.find(join(root, "other"), IDENTITY)


def test_switching_keeps_each_earlier_store_once() -> None:
    pointer = Pointer(store="s3://bkt/v1")
    for name in ("v2", "v3", "v1", "v3"):
        pointer = pointer.switched(f"s3://bkt/{name}")
    assert pointer.stores == ("s3://bkt/v3", "s3://bkt/v1", "s3://bkt/v2")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "it has format 2, this version of persona-plug reads format 1"),
        ({"store": 7}, "a value has a wrong type"),
        ({"store": ""}, "the path is empty"),
        ({"store": "relative"}, "'relative' is not a URI in normal form"),
        ({"store": "gs://bkt/v1"}, r"Google Cloud Storage \(gs://\) is not supported"),
        ({"earlier": "/v0"}, "a value has a wrong type"),
        ({"earlier": [["/v0"]]}, "a value has a wrong type"),
        ({"earlier": ["/v1"]}, "it names a store twice"),
        ({"since": "yesterday"}, "Invalid isoformat"),
        ({"stores": "/v1"}, "it has the fields format, store, since, earlier, stores"),
        ("[]", "it is not a JSON object with a format"),
        ("[" * 100_000, "recursion"),
        ("\ud800", "Expecting value"),
    ],
)
def test_a_broken_pointer_is_refused_by_name(tmp_path: Path, changes: dict | str, reason: str) -> None:
    pointers.write(str(tmp_path), Pointer(store="/v1"))
    file = tmp_path / "_current.json"
    text = changes if isinstance(changes, str) else json.dumps({**json.loads(file.read_text()), **changes})
    file.write_bytes(text.encode(errors="replace"))
    for use in (Store.open, Store.open_all, lambda uri: Store.find(uri, IDENTITY)):
        with pytest.raises(InputError, match=rf"{file} is not a valid pointer to a store \(.*{reason}"):
            use(str(tmp_path))


SWITCHES_FOR_EVER = """
import sys
from persona.store import pointer as pointers
pointer = pointers.read(sys.argv[1])
print("ready", flush=True)
while True:
    pointer = pointer.switched(pointer.earlier[0])
    pointers.write(sys.argv[1], pointer)
"""


def test_a_killed_switch_leaves_the_old_pointer_or_the_new_one(tmp_path: Path) -> None:
    pointers.write(str(tmp_path), Pointer(store="/v1").switched("/v2"))
    seen = set()
    for number in range(4):
        process = subprocess.Popen([sys.executable, "-c", SWITCHES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        until = time.monotonic() + 0.05 + 0.01 * number
        while time.monotonic() < until:
            pointer = pointers.read(str(tmp_path))
            assert pointer is not None and set(pointer.stores) == {"/v1", "/v2"}
            seen.add(pointer.store)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        pointer = pointers.read(str(tmp_path))
        assert pointer is not None and set(pointer.stores) == {"/v1", "/v2"}
    assert seen == {"/v1", "/v2"}, "it was read while it was being switched"
