"""The verdict of a benchmark in words: whether the own persona is ahead of each control, and what to try if it is not.

Rests on what `many_runs.compare` found for four plugs of equal steps: `plug` and `tuning` (the same without any
history), and both with recent texts in front of each prompt.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

Result = Literal["ahead", "behind", "undecided", "unknown"]

PLUG, TUNING, PLUG_TEXTS, TUNING_TEXTS = "plug", "tuning", "plug-texts", "tuning-texts"
FEW_STEPS = 310  # measured on ACL authors (docs/training.md): below, settings could not be told apart
_FEASIBLE = 100  # times as many users

_QUESTIONS = {
    "other": "Is it this user's history that helps: own persona against another user's?",
    "tuning": "Is it worth more than training without histories: own persona against prompt tuning?",
    "texts": "Can it replace texts in the prompt: own persona against prompt tuning with recent texts in front?",
    "added": "Does it add to texts in the prompt: own persona with texts against prompt tuning with the same texts?",
}
_ADVICE = {
    "other": (
        "Check that a request leaves something to know about the user: if the input says nearly everything, no history "
        "helps. Then take users with longer histories (--min-history), or another task (--task opening, --task which)."
    ),
    "tuning": (
        "Train longer (more requests or --epochs): the personal part of a gain comes last. In the recipe, try a larger "
        "persona_gain and more persona_tokens. If it stays so, prompt tuning is the cheaper choice for this task."
    ),
    "texts": (
        "If recent texts are at hand for every request and the prompt has room, put them in front; the persona is for "
        "requests where they are not, or where they cost too much."
    ),
    "added": (
        "Use texts or the persona, not both; or train longer, as a plug learns to read the texts first. Long texts "
        "(--retrieve-tokens) already say much of what a persona could."
    ),
}

_AHEAD_OF_TEXTS = {
    "texts": "can replace recent texts in the prompt",
    "added": "adds to recent texts in the prompt",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question of the verdict.

    Attributes:
        saved: what the own persona saves against the control, in nats a token, with its interval; above 0 is better.
        advice: what to try; empty if the own persona is ahead.
    """

    name: str
    question: str
    saved: Mapping[str, float]
    result: Result
    sentence: str
    advice: str


def verdict(
    found: Mapping[str, Any],
    found_texts: Mapping[str, Any] | None,
    *,
    steps: int,
    soft_tokens: int,
    text_tokens: int,
) -> dict[str, Any]:
    """The verdict as plain values for JSON: the checks, a conclusion in one sentence, and notes.

    Args:
        found: the comparison against `tuning/none`.
        found_texts: the comparison against `tuning-texts/none`; None without texts.
        steps: of each training.
        soft_tokens: positions that a persona takes in the prompt.
        text_tokens: positions that the texts take at most.
    """
    own = _row(found, PLUG, "own")
    saved = {
        "other": _row(found, PLUG, "other")["above_own"],
        "tuning": _negative(own["above_reference"]),
    }
    if found_texts is not None:
        saved["texts"] = _negative(_row(found_texts, PLUG, "own")["above_reference"])
        saved["added"] = _negative(_row(found_texts, PLUG_TEXTS, "own")["above_reference"])
    checks = [_check(name, interval, found["users"]) for name, interval in saved.items()]
    results = {check.name: check.result for check in checks}
    notes = []
    if found_texts is not None:
        notes.append(f"A persona takes {soft_tokens:,} positions of the prompt, the texts up to {text_tokens:,}.")
    if steps < FEW_STEPS and any(check.result != "ahead" for check in checks):
        notes.append(f"The plugs were trained for {steps:,} steps; below {FEW_STEPS:,} little can be told apart.")
    if len(own["seeds"]) < 2:
        notes.append("One seed: an interval over users does not know how far two trainings differ. Add --seeds 0 1.")
    return {"conclusion": _conclusion(results), "checks": [asdict(check) for check in checks], "notes": notes}


def _row(found: Mapping[str, Any], name: str, persona: str) -> Mapping[str, Any]:
    row: Mapping[str, Any] = next(row for row in found["rows"] if (row["name"], row["persona"]) == (name, persona))
    return row


def _negative(interval: Mapping[str, float]) -> Mapping[str, float]:
    return {"mean": -interval["mean"], "low": -interval["high"], "high": -interval["low"]}


def _check(name: str, saved: Mapping[str, float], n_users: int) -> Check:
    result: Result = "undecided"
    if not isfinite(saved["low"]):
        result = "unknown"
    elif saved["low"] > 0:
        result = "ahead"
    elif saved["high"] < 0:
        result = "behind"
    number = f"{saved['mean']:+.4f} nats a token"
    if result != "unknown":
        number += f" [{saved['low']:+.4f}, {saved['high']:+.4f}]"
    sentence = {
        "ahead": f"Yes: it saves {number}.",
        "behind": f"No: it loses, {number}.",
        "undecided": f"Not shown: {number}; the interval includes zero. {_users_needed(saved, n_users)}",
        "unknown": f"Unknown: {number} for a single user, which gives no interval.",
    }[result]
    advice = "" if result == "ahead" else _ADVICE[name]
    return Check(
        name=name, question=_QUESTIONS[name], saved=saved, result=result, sentence=sentence.strip(), advice=advice
    )


def _users_needed(saved: Mapping[str, float], n_users: int) -> str:
    """How many users would show a difference of this size: an interval shrinks with the root of their number."""
    half = saved["mean"] - saved["low"] if saved["mean"] > 0 else saved["high"] - saved["mean"]
    times = (half / saved["mean"]) ** 2 if saved["mean"] else float("inf")
    if times > _FEASIBLE:
        return "A difference as small as this does not matter."
    return f"If the difference is real, about {float(f'{times * n_users:.2g}'):,.0f} held-out users would show it."


def _conclusion(results: Mapping[str, Result]) -> str:
    if results["other"] != "ahead":
        return "These requests do not show that a user's own history helps."
    if results["tuning"] != "ahead":
        return "The history is read, but the plug as a whole is not shown to be worth more than prompt tuning."
    ahead = ["is worth more than the same training without histories"]
    ahead += [words for name, words in _AHEAD_OF_TEXTS.items() if results.get(name) == "ahead"]
    return f"The persona {', '.join(ahead[:-1])}{' and ' if ahead[:-1] else ''}{ahead[-1]}."
