"""The figure of `style`: what the own persona gains over another's, and how many answers obey, by the strength."""

import json
from pathlib import Path
from typing import Any

from persona.report import drawing
from persona.report.palette import LIGHT
from persona.strengths import parse

_COLORS = {"nll": "own", "preference": "other", "both": "mean"}
_DPI = 150


@drawing.style()
def draw(table: Path, out: Path) -> None:
    """Draws the numbers of `style_table.write` as a PNG file."""
    from matplotlib.figure import Figure

    numbers = json.loads(table.read_text())
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    gains, obeys = figure.subplots(1, 2)
    for shift, (loss, color) in enumerate(_COLORS.items(), start=-1):
        if loss not in numbers:
            continue
        strengths = sorted((parse(name)[1], name, value) for name, value in numbers[loss]["strengths"].items())
        _intervals(gains, [(strength + 0.03 * shift, value) for strength, _, value in strengths], LIGHT[color])
        answers = sorted((parse(name)[1], of["all"]) for name, of in numbers[loss]["obeys"].items())
        obeys.plot(*zip(*answers, strict=True), color=LIGHT[color], marker="o", markersize=5, label=loss)
    gains.axhline(0, color=LIGHT["quiet"], linewidth=0.8)
    gains.set(xlabel="strength α", ylabel="own − other, nats a token")
    obeys.axhline(numbers["bare"]["obeys"]["bare"]["all"], color=LIGHT["bare"], linestyle="--", label="LLM alone")
    obeys.set(xlabel="strength α", ylabel="answers that obey", ylim=(0, 1))
    for axes in (gains, obeys):
        axes.grid(axis="y")
    figure.legend(*obeys.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(out, format="png", dpi=_DPI)


def _intervals(axes: Any, points: list[tuple[float, dict[str, float]]], color: str) -> None:
    places = [place for place, _ in points]
    axes.plot(places, [value["mean"] for _, value in points], color=color, marker="o", markersize=5)
    for place, value in points:
        axes.plot([place, place], [value["low"], value["high"]], color=color, linewidth=1.2)
