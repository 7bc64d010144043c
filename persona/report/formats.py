"""How a report classifies and writes numbers, intervals and texts.

An interval is a mapping with `mean`, `low` and `high`. The bounds are NaN or None when there is only one user.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

Interval = Mapping[str, Any]
Verdict = Literal["gain", "loss", "noise", "unknown"]

_LONGEST_TEXT = 600


def has_bounds(interval: Interval) -> bool:
    """Whether the interval has two ends."""
    return interval["low"] is not None and math.isfinite(interval["low"])


def verdict(interval: Interval, *, lower_is_better: bool = False, chance: float = 0.0) -> Verdict:
    """Whether an interval is above or below `chance`, includes it ("noise"), or has no bounds ("unknown")."""
    if not has_bounds(interval):
        return "unknown"
    if interval["low"] > chance:
        return "loss" if lower_is_better else "gain"
    if interval["high"] < chance:
        return "gain" if lower_is_better else "loss"
    return "noise"


def bounds(interval: Interval) -> str:
    """The two ends in brackets."""
    return f"[{interval['low']:.4f}, {interval['high']:.4f}]" if has_bounds(interval) else "–"


def signed_bounds(interval: Interval) -> str:
    """The two ends of a difference in brackets, with their signs."""
    return f"[{interval['low']:+.4f}, {interval['high']:+.4f}]" if has_bounds(interval) else "–"


def percent_bounds(interval: Interval) -> str:
    """The two ends of a share in brackets, in percent."""
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]" if has_bounds(interval) else "–"


def span(row: Mapping[str, Any]) -> str:
    """The history lengths of a group of requests, like 3–5."""
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']}–{row['to']}"


def cut(text: str) -> str:
    """A text of bounded length."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def flat(value: Any) -> str:
    """A value of the settings on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {flat(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(flat, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def model_name(model: str) -> str:
    """The hub id of a model, or the last part of the path of its folder."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "s3://")) else model


def stage(row: Mapping[str, Any]) -> str:
    """The stage of a version of a plug in words."""
    return str(row["stage"]).replace("_", " ")


def version(row: Mapping[str, Any]) -> str:
    """A version of a plug by its number, or as the one of the page."""
    return "this one" if row["version"] is None else f"v{row['version']}"
