"""Which modules of a source tree import which: read from the files, so type-only and local imports count as well."""

import ast
import graphlib
from collections.abc import Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    """`persona/store/table.py` is `persona.store.table`, `persona/store/__init__.py` is `persona.store`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str) -> set[str]:
    """Every name that a source imports, with its module: `from a import b` gives `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """For each module of `sources` (text by module name), the other modules of `sources` that it imports."""
    graph: dict[str, set[str]] = {}
    for module, text in sources.items():
        targets = (name if name in sources else name.rpartition(".")[0] for name in imported(text))
        graph[module] = {name for name in targets if name in sources and name != module}
    return graph


def find_cycle(graph: Graph) -> list[str] | None:
    """Modules that import each other in a circle, the first one repeated at the end; None when there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return None
