"""Finds the error of ours that Ray wrapped on its way from a worker to the driver."""

import re

from persona.errors import PersonaError


def find_persona_error(error: BaseException) -> PersonaError | None:
    """The PersonaError that `error` is or carries, however many layers of Ray wrap it.

    Ray's wrappers keep the worker's exception in `cause` (tasks) or `worker_failures` (training). They may also take
    the type of what they wrap, with a whole traceback as their text, so the wrapped exceptions are searched first.
    Ray Data, and an actor that fails to start, keep only that text. An error that was being handled when a bug struck
    does not count.
    """
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or any(current is one for one in seen):
            continue
        seen.append(current)
        failures = getattr(current, "worker_failures", {})
        inside = [getattr(current, "cause", None), *failures.values()]
        inside = [one for one in inside if isinstance(one, BaseException)]
        if isinstance(current, PersonaError) and not inside:
            return current
        waiting += [current.__cause__, *reversed(inside)]
    texts = (str(one) for one in seen if type(one).__module__.startswith("ray."))
    return next((found for found in map(_read_traceback, texts) if found is not None), None)


def _read_traceback(text: str) -> PersonaError | None:
    """The PersonaError in which a traceback ends, or that caused what it ends in."""
    kinds = _kinds_by_name()
    names = "|".join(map(re.escape, kinds))
    found = list(re.finditer(rf"^({names}): (.+?)(?=\n\s*\n|\Z)", text, re.MULTILINE | re.DOTALL))
    if not found or "During handling of the above exception" in text[found[-1].end() :]:
        return None
    name, message = found[-1].groups()
    return kinds[name](message.strip())


def _kinds_by_name() -> dict[str, type[PersonaError]]:
    """Every class of our errors by the name that a traceback prints."""
    found: dict[str, type[PersonaError]] = {}
    waiting: list[type[PersonaError]] = [PersonaError]
    while waiting:
        kind = waiting.pop()
        found[f"{kind.__module__}.{kind.__qualname__}"] = kind
        waiting += kind.__subclasses__()
    return found
