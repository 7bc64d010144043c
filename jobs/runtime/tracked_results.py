"""What an experiment tracker gets of an evaluation or a comparison: numbers by name, and pages without users.

`forget` cannot follow users into another system, so their ids, texts and dots on the map stay in the job's own output.
"""

from collections.abc import Mapping
from typing import Any

PERSONAL = ("examples", "largest_gains", "largest_losses", "map")
"""The parts of `metrics.json` that are about single users."""


def evaluation_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `metrics.json`, by name: losses, what the own persona saves, and scores."""
    found: dict[str, float] = {}
    for persona, loss in metrics["loss"].items():
        found |= _interval(f"loss/{persona}", loss)
    for persona, saved in metrics["loss_saved_by_own"].items():
        found |= _interval(f"saved_against/{persona}", saved)
    for variant, scores in metrics["scores"].items():
        found |= {f"score/{variant}/{name}": value for name, value in scores.items()}
    return found


def evaluation_files(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """The page of an evaluation and its charts as files, by name, without users."""
    from persona.report.pages import chart_files, evaluation_page

    anonymous = {**metrics, **{name: [] for name in PERSONAL}}
    return {"report.html": evaluation_page(anonymous), **chart_files(anonymous)}


def comparison_numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `comparison.json`, by name: losses, and differences to the reference."""
    numbers: dict[str, float] = {}
    for row in found["rows"]:
        label = f"{row['name']}/{row['persona']}"
        numbers |= _interval(f"loss/{label}", row["loss"])
        if row["above_reference"]:
            numbers |= _interval(f"above_reference/{label}", row["above_reference"])
    return numbers


def _interval(name: str, interval: Mapping[str, float]) -> dict[str, float]:
    return {name: interval["mean"], f"{name}/low": interval["low"], f"{name}/high": interval["high"]}
