"""Persona embeddings of users, and a plug that personalizes a frozen LLM; the names below are the Python API.

`import persona` loads nothing heavy: each name is imported when it is first used. See `docs/python.md`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona.api import History, LoadedPlug, Loss, Persona, load_plug, open_store, read_history
    from persona.engines.base import Answer
    from persona.options import Decoding, PersonaKind
    from persona.store.store import Store

    __version__: str

__all__ = [
    "Answer",
    "Decoding",
    "History",
    "LoadedPlug",
    "Loss",
    "Persona",
    "PersonaKind",
    "Store",
    "__version__",
    "load_plug",
    "open_store",
    "read_history",
]
_ELSEWHERE = {
    "Answer": "persona.engines.base",
    "Decoding": "persona.options",
    "PersonaKind": "persona.options",
    "Store": "persona.store.store",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("persona-plug")
        except PackageNotFoundError:
            return "(not installed)"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ELSEWHERE.get(name, "persona.api")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
