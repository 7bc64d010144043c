"""The door to the store: nothing calls a storage library outside of it, and a store that hangs cannot get past it."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from persona import storage
from persona.errors import StorageError
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits
from persona.storage import join
from persona.store import vacuum
from persona.store.store import Store
from persona.store.table import Table
from tests.imports import imported
from tests.stores import IDENTITY, answers, commit_staged
from tests.test_layers import SOURCES

# Functions that repeat the work they are given, and raise its errors in one line.
DOORS = {"with_retries", "retry_transient", "retried", "_read", "storage_errors"}
# The requests of `persona.storage.s3`, the layer below the door.
REQUESTS = {"age_s", "client", "copy", "create", "delete", "download", "get", "head", "pages", "put", "upload"}
LIBRARIES = {
    "boto3": {"persona.storage.reach", "persona.storage.s3"},
    "botocore": {"persona.storage.files", "persona.storage.reach", "persona.storage.retry", "persona.storage.s3"},
    "pyarrow.fs": {"persona.storage.files", "persona.storage.s3", "persona.models.resolve"},
    "deltalake.DeltaTable": {"persona.inputs.delta", "persona.store.delta_calls"},
    "deltalake.write_deltalake": set(),
}
# They read files piece by piece, with the retries of Arrow, and turn the store's errors into their own.
STREAMS = {"persona.inputs.jsonl", "persona.inputs.parquet", "jobs.import_lamp"}


class Module:
    """The syntax tree of a module, with the way up."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.parent = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def raw_calls(self, is_raw: Callable[[ast.AST], bool]) -> list[tuple[int, bool]]:
        """Line of each node that is raw, and whether it is inside the door; annotations do not count."""
        nodes = [node for node in ast.walk(self.tree) if is_raw(node) and not self._is_annotation(node)]
        return [(getattr(node, "lineno", 0), self._is_inside(node, frozenset())) for node in nodes]

    def _is_annotation(self, node: ast.AST) -> bool:
        above = self.parent[node]
        return isinstance(above, ast.AnnAssign) and above.annotation is node

    def _is_inside(self, node: ast.AST, seen: frozenset[str]) -> bool:
        """Whether it is in an argument or the body of a door, or in something that is only used there."""
        while (above := self.parent.get(node)) is not None:
            if isinstance(above, ast.Call) and node is not above.func and _name(above.func) in DOORS:
                return True
            if isinstance(above, ast.With) and node in above.body:
                doors = [item.context_expr for item in above.items if isinstance(item.context_expr, ast.Call)]
                if any(_name(call.func) in DOORS for call in doors):
                    return True
            name = above.name if isinstance(above, ast.FunctionDef) else None
            if isinstance(above, ast.Assign) and isinstance(above.targets[0], ast.Name):
                name = above.targets[0].id
            if name is not None and self._is_used_inside(name, above, seen):
                return True
            node = above
        return False

    def _is_used_inside(self, name: str, defined: ast.AST, seen: frozenset[str]) -> bool:
        """Whether all uses of a local name, a function of the module or a method are inside the door."""
        if name in seen:
            return False
        scope = self.parent[defined]
        nodes = ast.walk(self.tree if isinstance(scope, ast.ClassDef) else scope)
        kind = ast.Attribute if isinstance(scope, ast.ClassDef) else ast.Name
        uses = [node for node in nodes if isinstance(node, kind) and _name(node) == name and not _is_stored(node)]
        return bool(uses) and all(self._is_inside(node, seen | {name}) for node in uses)


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _is_stored(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store)


def is_delta_call(node: ast.AST) -> bool:
    """`DeltaTable`, or an attribute of one."""
    return _name(node) == "DeltaTable" or (isinstance(node, ast.Attribute) and _name(node.value) == "_delta")


def is_request(node: ast.AST) -> bool:
    """`s3.get(...)` and the like."""
    return isinstance(node, ast.Attribute) and _name(node.value) == "s3" and node.attr in REQUESTS


def is_filesystem(node: ast.AST) -> bool:
    """A method of a variable `filesystem`, or the variable as an argument."""
    return isinstance(node, ast.Name) and node.id == "filesystem" and not _is_stored(node)


def test_the_search_finds_what_is_outside() -> None:
    inside = "def read(self):\n    return with_retries(self._delta.version, 'x')"
    for source, expected in [
        (inside, [True]),
        ("def read(self):\n    return self._delta.version()", [False]),
        ("def open(uri):\n    opened = partial(DeltaTable, uri)\n    return with_retries(opened, 'x')", [True]),
        ("def open(uri):\n    opened = partial(DeltaTable, uri)\n    return opened()", [False]),
        ("def go(self):\n    def read():\n        return self._delta.x()\n    return self._read(read)", [True]),
        ("def go(self):\n    def read():\n        return self._delta.x()\n    read()\n    retried(read, '')", [False]),
        ("def go(self):\n    def read():\n        self._delta.x()\n    file.read()\n    retried(read, '')", [True]),
        ("def go(self):\n    with storage_errors('x'):\n        self._delta.x()", [True]),
    ]:
        assert [is_inside for _, is_inside in Module(source).raw_calls(is_delta_call)] == expected, source


def test_only_the_door_imports_a_storage_library() -> None:
    found: dict[str, set[str]] = {library: set() for library in LIBRARIES}
    for module, source in SOURCES.items():
        if any(library.split(".")[0] in source for library in LIBRARIES):
            names = imported(source)
            for library in LIBRARIES:
                if any(name == library or name.startswith(f"{library}.") for name in names):
                    found[library].add(module)
    assert found == LIBRARIES


def test_every_call_of_a_storage_library_is_inside_the_door() -> None:
    n_calls: Counter[str] = Counter()
    outside = []
    for module, source in SOURCES.items():
        kinds = [
            *([is_delta_call] if module == "persona.store.delta_calls" else []),
            *([is_request] if module != "persona.storage.s3" and "s3." in source else []),
            *([is_filesystem] if module not in STREAMS and "open_filesystem" in source else []),
        ]
        for line, is_inside in (found for kind in kinds for found in Module(source).raw_calls(kind)):
            n_calls[module] += 1
            outside += [] if is_inside else [f"{module}:{line}"]
    assert not outside
    assert n_calls["persona.store.delta_calls"] > 12 and n_calls["persona.storage.files"] > 10
    assert n_calls["persona.store.data_files"] and n_calls["persona.models.resolve"]


_PROXY = """
import json, sys
from tests.faulty_s3 import FaultyS3
with FaultyS3(sys.argv[1], seed=7) as proxy:
    proxy.delay_s = 60.0
    print(proxy.url, flush=True)
    for line in sys.stdin:
        before = proxy.done["delay"]
        for name, value in json.loads(line).items():
            setattr(proxy, name, value)
        print(before, flush=True)
"""


@contextmanager
def hanging_store(upstream: str) -> Iterator[Callable[..., int]]:
    """A proxy in a process of its own, as delta-rs holds the GIL in some requests. Calling it sets its attributes, and
    returns how many requests have hung so far."""
    command = [sys.executable, "-c", _PROXY, upstream]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with (
        subprocess.Popen(command, env=environment, **pipes) as process,
        pytest.MonkeyPatch.context() as patched,
    ):
        assert process.stdin is not None and process.stdout is not None
        patched.setenv("AWS_ENDPOINT_URL", process.stdout.readline().strip())

        def configure(**attributes: Any) -> int:
            process.stdin.write(json.dumps(attributes) + "\n")
            return int(process.stdout.readline())

        yield configure
        process.stdin.close()


def a_run(store: Store) -> None:
    """Open, take the lease, stage, commit, replace, read, inspect and clean up, as the jobs do."""
    with Store.open(store.uri).writer("generations", job="test") as writer:
        writer.add(store.stage("generations", answers("r-1", "r-2")))
        commit_staged(writer, store.stage("generations", answers("r-1", changes=["gone"])))
        writer.vacuum(keep_hours=1)
        assert writer.table.runs()
        vacuum.delete_old_versions(writer.table, lease=writer.lease.number)
    assert store.read_generations().num_rows == 1


REQUESTS_OF_A_RUN = {
    "listing the log": "GET .*prefix=[^&]*_delta_log",
    "reading the log": "GET [^?]*_delta_log/0",
    "committing": "PUT .*_delta_log",
    "data files": "(GET|PUT) .*part-",
    "the lease": "_leases",
}


@pytest.mark.parametrize("pattern", REQUESTS_OF_A_RUN.values(), ids=REQUESTS_OF_A_RUN)
def test_a_request_that_hangs_is_repeated(s3: str, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Two requests of its kind hang until the client gives up on them."""
    monkeypatch.setenv("PERSONA_STORAGE_TIMEOUT_S", "6")
    store = Store.create(join(s3, "store"), IDENTITY, 4)
    with hanging_store(os.environ["AWS_ENDPOINT_URL"]) as configure:
        configure(share=1.0, kinds=["delay"], max_faults=2, pattern=pattern)
        a_run(store)
        assert configure() == 2
    assert Store.open(store.uri).read_generations()["request_id"].to_pylist() == ["r-2"]


def test_a_store_that_only_hangs_ends_every_kind_of_work_with_one_line(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONA_STORAGE_TIMEOUT_S", "3")
    store = Store.create(join(s3, "store"), IDENTITY, 4)
    a_run(store)
    storage.write_bytes(f"{s3}/in.jsonl", b'{"user_id": "u", "text": "t"}\n')
    with hanging_store(os.environ["AWS_ENDPOINT_URL"]) as configure:
        tables = [Table(join(store.uri, "generations"), "generations") for _ in range(8)]
        (file,) = {table.version(): table.files() for table in tables}.popitem()[1]
        splits = plan_splits(f"{s3}/in.jsonl", flag="--histories")
        works: list[Callable[[], object]] = [
            lambda: Store.open(store.uri),
            tables[0].version,
            tables[1].lease,
            tables[2].files,
            tables[3].file_list,
            tables[4].runs,
            tables[5].partitions,
            lambda: tables[6].log._last_read().transaction_version("persona.lease"),
            lambda: tables[6].log._last_read().unused_files(1),
            lambda: tables[6].log._last_read().create_checkpoint(),
            lambda: tables[7].read_file(file),
            tables[7].stored_paths,
            lambda: storage.age_s(f"{store.uri}/x"),
            lambda: list(read_split(splits[0])),
        ]
        configure(share=1.0, kinds=["delay"])
        with ThreadPoolExecutor(len(works)) as pool:
            errors = [done.exception() for done in [pool.submit(work) for work in works]]
    for error in errors:
        assert isinstance(error, StorageError) and "\n" not in str(error), repr(error)
