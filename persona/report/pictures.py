"""The report's charts as PNG files, for slides and papers; they need matplotlib, the extra `report`."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"own": "#2563c9", "other": "#c9541b", "mean": "#12826f", "none": "#7b7f87", "bare": "#8a5fb8"}
_GAIN, _LOSS = "#1d7a48", "#b93131"


def draw(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name, those for which there is data; none at all where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return {}
    found = {}
    for name, draw_on in {"gain.png": _gain, "curves.png": _curves, "map.png": _map}.items():
        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        if draw_on(axes, metrics):
            data = io.BytesIO()
            figure.savefig(data, format="png")
            found[name] = data.getvalue()
    return found


def _gain(axes: "Axes", metrics: Mapping[str, Any]) -> bool:
    rows = metrics["gain_by_history_length"]
    for shift, kind in enumerate(rows[0]["saved_by_own"] if rows else ()):
        saved = [row["saved_by_own"][kind] for row in rows]
        places = [place + 0.12 * shift for place in range(len(rows))]
        means = [one["mean"] for one in saved]
        errors = [[one["mean"] - one["low"] for one in saved], [one["high"] - one["mean"] for one in saved]]
        axes.errorbar(places, means, yerr=errors, fmt="o", capsize=3, color=_COLORS[kind], label=f"against {kind}")
    if rows:
        labels = [f"{row['from']}–{row['to']}\n({row['requests']:,})" for row in rows]
        axes.set_xticks(range(len(rows)), labels)
        axes.axhline(0, color="#888888", linewidth=0.8, linestyle="--")
        axes.set(xlabel="behaviors that the request sees (requests)", ylabel="nats a token saved by own")
        axes.legend(frameon=False)
    return bool(rows)


def _curves(axes: "Axes", metrics: Mapping[str, Any]) -> bool:
    training = metrics["training"]
    curves = {"training": "training_curve", "held-out": "validation_curve"}
    drawn = False
    for (label, name), color in zip(curves.items(), ("#7b7f87", "#2563c9"), strict=True):
        if training.get(name):
            steps, losses = zip(*training[name], strict=True)
            axes.plot(steps, losses, color=color, label=label, linewidth=1 if label == "training" else 2)
            drawn = True
    if drawn:
        axes.set(xlabel="step", ylabel="nats a token")
        axes.legend(frameon=False)
    return drawn


def _map(axes: "Axes", metrics: Mapping[str, Any]) -> bool:
    users = metrics["map"]
    for color, label, mine in (
        (_GAIN, "own saves", [user for user in users if user["saved"] >= 0]),
        (_LOSS, "own costs", [user for user in users if user["saved"] < 0]),
    ):
        axes.scatter([user["x"] for user in mine], [user["y"] for user in mine], s=22, color=color, label=label)
    if users:
        axes.set(xlabel="first principal direction of the personas", ylabel="second", xticks=[], yticks=[])
        axes.legend(frameon=False)
    return bool(users)
