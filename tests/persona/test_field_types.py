"""Values read from JSON have the types that a dataclass declares, or the field is named."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from persona.field_types import check_field_types


@dataclass(frozen=True, kw_only=True)
class Inside:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    text: str = "a"
    share: float = 0.5
    is_on: bool = True
    kind: Literal["a", 1] = "a"
    maybe: int | None = None
    names: dict[str, str] = None  # type: ignore[assignment]
    table: Mapping[str, int] = None  # type: ignore[assignment]
    pairs: tuple[str, ...] = ("a",)
    anything: Any = object
    inside: Inside = Inside()


GOOD = Record(names={"a": "b"}, table={"a": 1})


@pytest.mark.parametrize("values", [{}, {"share": 1}, {"kind": 1}, {"maybe": 3}, {"names": {}}, {"pairs": ()}], ids=str)
def test_values_of_the_declared_types_fit(values):
    check_field_types(replace(GOOD, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": 3}, "text must be str, not '3'"),
        ({"share": "0.5"}, "share must be float, not '0.5'"),
        ({"share": float("inf")}, "share must be float, not 'inf'"),
        ({"share": True}, "share must be float"),
        ({"is_on": 1}, "is_on must be bool"),
        ({"kind": "b"}, "kind must be 'a' or 1, not 'b'"),
        ({"kind": True}, "kind must be 'a' or 1, not 'True'"),
        ({"maybe": "3"}, r"maybe must be int \| None"),
        ({"names": {"a": 1}}, r"names must be dict\[str, str\]"),
        ({"table": [1]}, "table must be"),
        ({"pairs": (1,)}, "pairs must be"),
        ({"pairs": ["a"]}, "pairs must be"),
        ({"inside": {"size": 1}}, "inside must be Inside"),
        ({"inside": Inside(size=1.5)}, "size must be int, not '1.5'"),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_a_value_of_another_type_is_named(values, message):
    with pytest.raises(TypeError, match=message):
        check_field_types(replace(GOOD, **values))
