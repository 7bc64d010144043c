"""The strength of a persona: how far an answer's persona embedding is from the typical one.

At strength α the persona is P_typical + α·(P − P_typical): 1 is the user's own, 0 that of a user without a history, and
more than 1 goes on in the same direction.
"""

import math
from collections.abc import Iterable, Sequence

from persona.errors import UsageError
from persona.options import PersonaKind

_MARK = "-strength-"


def name_at(kind: PersonaKind, strength: float) -> str:
    """The name of a kind of persona at a strength, like `own-strength-0.5`; at 1 it is that of the kind."""
    return kind.value if strength == 1 else f"{kind.value}{_MARK}{str(float(strength)).removesuffix('.0')}"


def names_at(kinds: Iterable[PersonaKind], strengths: Sequence[float]) -> list[str]:
    """The names of some kinds at each strength; kinds without a history have no strength, so each appears once."""
    return [name_at(kind, strength) for kind in kinds for strength in ([1.0] if kind.sees_no_history else strengths)]


def parse(name: str) -> tuple[PersonaKind, float]:
    """The kind and the strength of a name that `name_at` made."""
    kind, _, strength = name.partition(_MARK)
    return PersonaKind(kind), float(strength or 1)


def check(kinds: Iterable[PersonaKind], strengths: Sequence[float]) -> None:
    """Raises UsageError for values of --persona-strength that cannot work, or that have no effect on these kinds."""
    given = f"--persona-strength {' '.join(map(str, strengths))}"
    if not strengths or len(set(strengths)) < len(strengths) or not all(0 <= one < math.inf for one in strengths):
        raise UsageError(f"{given}: give numbers of 0 or more, each at most once; 1 is the persona as trained")
    if tuple(strengths) != (1,) and all(kind.sees_no_history for kind in kinds):
        raise UsageError(
            f"{given} has no effect on personas without a history; add own, other or mean, or leave it out"
        )
