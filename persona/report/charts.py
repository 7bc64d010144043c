"""The charts of the reports, as matplotlib figures that serve both the page (SVG) and PNG files.

A function returns None where there is nothing to draw. Dots whose interval includes zero are hollow.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from persona.report import formats
from persona.report.drawing import Chart, style
from persona.report.formats import Interval
from persona.report.palette import LIGHT, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT, _ROW_HEIGHT = 4.8, 3.3, 0.3  # inches: narrow, so that texts stay readable on a phone
_MARGIN = 0.06  # of an axis, around the values
_LINE_POINTS = 200
_LONGEST_LABEL, _LONGEST_SPAN = 26, 4  # characters
_NATS = "nats a token"
_CURVE_COLORS = ("own", "other", "mean", "bare", "gain", "loss")
CURVES_A_CHART = len(_CURVE_COLORS)
_STAGE_COLORS = {"live": "own", "retired": "none", "rolled_back": "other", "refused": "loss"}


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """One line of a forest plot."""

    label: str
    persona: str
    interval: Interval


@dataclass(kw_only=True)
class _Canvas:
    """A figure with one pair of axes, and the tooltips of the marks on it."""

    figure: "Figure"
    axes: "Axes"
    titles: dict[str, str] = field(default_factory=dict)
    has_noise: bool = False

    def chart(self, description: str, legend: Mapping[str, str]) -> Chart:
        return Chart(
            figure=self.figure,
            description=description,
            legend=legend,
            titles=self.titles,
            has_noise=self.has_noise,
        )

    def interval(self, x: float, y: float, bounds: tuple[float, float], *, along: str, color: str) -> None:
        """The line of an interval, along the axis x or y."""
        xs, ys = (bounds, (y, y)) if along == "x" else ((x, x), bounds)
        self.axes.plot(xs, ys, color=LIGHT[color], linewidth=2, clip_on=False, gid=f"whisker {color}#")

    def dot(self, x: float, y: float, *, color: str, title: str, hollow: bool = False, alpha: float = 1.0) -> None:
        """A dot with a tooltip."""
        gid = f"dot {color}#{len(self.titles)}"
        face = LIGHT["card"] if hollow else LIGHT[color]
        edge = LIGHT[color] if hollow else LIGHT["card"]
        # A dot of one color is not distinguishable from its neighbors without an edge.
        (line,) = self.axes.plot(
            x, y, "o", markersize=7, markeredgewidth=1.8 if hollow else 0.8, markeredgecolor=edge, zorder=3, gid=gid
        )
        line.set(markerfacecolor=face, alpha=alpha, clip_on=False)
        self.titles[gid] = title
        self.has_noise = self.has_noise or hollow

    def zero(self, *, along: str) -> None:
        """A dashed line at zero, along the axis x or y."""
        draw = self.axes.axhline if along == "x" else self.axes.axvline
        draw(0, color=LIGHT["quiet"], linewidth=1, linestyle=(0, (4, 3)), clip_on=False, gid="zero#")

    def scale(self, axis: str, values: Sequence[float], *, ticks: int = 5, margin: float = _MARGIN) -> None:
        """Limits around the finite values, and round ticks."""
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite), max(finite)
        room = margin * (high - low) if high > low else 0.5 * max(abs(high), 1.0)
        target = self.axes.xaxis if axis == "x" else self.axes.yaxis
        target.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
        target.set_major_formatter(FuncFormatter(_tick))
        (self.axes.set_xlim if axis == "x" else self.axes.set_ylim)(low - room, high + room)


@style()
def gain_by_history_length(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """What the own persona saves against each other kind, by groups of history length (see `leaves_out_bare`)."""
    kinds = list(rows[0]["saved_by_own"]) if rows else []
    if leaves_out_bare(kinds):
        kinds.remove("bare")
    if not kinds:
        return None
    canvas = _canvas()
    gap = min(0.17, 0.8 / len(kinds))
    values = [0.0]
    for i, row in enumerate(rows):
        for k, kind in enumerate(kinds):
            saved, x = row["saved_by_own"][kind], i + (k - (len(kinds) - 1) / 2) * gap
            label = f"{formats.span(row)}, against {kind}"
            values += _mark(canvas, saved, along="y", place=x, color=series(kind), label=label)
    canvas.zero(along="x")
    canvas.scale("y", values)
    canvas.axes.set_xticks(range(len(rows)), [_broken(formats.span(row)) for row in rows])
    canvas.axes.set_xlim(-0.5, len(rows) - 0.5)
    canvas.axes.grid(axis="y")
    canvas.axes.set(xlabel="behaviors that the request sees", ylabel=f"{_NATS} saved by own")
    return canvas.chart("gain by history length", {series(kind): f"against {kind}" for kind in kinds})


@style()
def training_curves(training: Mapping[str, Any]) -> Chart | None:
    """Losses of the training steps and of held-out requests; long curves are thinned to means of neighbors."""
    curves = {
        "none": ("training", _thinned(training.get("training_curve") or [])),
        "own": ("held-out", _thinned(training.get("validation_curve") or [])),
    }
    found = {color: (label, points) for color, (label, points) in curves.items() if points}
    if not found:
        return None
    canvas = _canvas()
    for color, (_, points) in found.items():
        _curve(canvas, points, color=color, width=1.2 if color == "none" else 2)
    every = [point for _, points in found.values() for point in points]
    canvas.scale("x", [x for x, _ in every], margin=0.02)
    canvas.scale("y", [y for _, y in every])
    canvas.axes.grid(axis="y")
    canvas.axes.set(xlabel="step", ylabel=_NATS)
    return canvas.chart("loss by training step", {color: label for color, (label, _) in found.items()})


@style()
def persona_map(users: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Users on the first two principal components of their personas; a larger gain or loss is a stronger color."""
    if not users:
        return None
    sizes = sorted(abs(user["saved"]) for user in users)
    # The largest values get one strength, so that a single outlier does not leave all others pale.
    strongest = max(sizes[int(0.95 * (len(sizes) - 1))], 1e-12)
    canvas = _canvas()
    for user in sorted(users, key=lambda user: abs(user["saved"])):
        canvas.dot(
            user["x"],
            user["y"],
            color="gain" if user["saved"] >= 0 else "loss",
            alpha=0.25 + 0.75 * min(abs(user["saved"]) / strongest, 1.0),
            title=f"{user['user_id']}: {user['n_behaviors']} behaviors, saved {user['saved']:+.4f}",
        )
    for axis in ("x", "y"):
        canvas.scale(axis, [user[axis] for user in users])
    canvas.axes.set(xlabel="first principal component", ylabel="second", xticks=[], yticks=[])
    canvas.axes.spines["left"].set_visible(True)
    return canvas.chart("map of personas", {"gain": "own saves", "loss": "own costs"})


@style()
def gain_by_user(users: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The users' gains in descending order."""
    if not users:
        return None
    saved = sorted((user["saved"] for user in users), reverse=True)
    points = [(100 * (i + 0.5) / len(saved), value) for i, value in enumerate(saved)]
    canvas = _canvas()
    _curve(canvas, points, color="own", width=2)
    canvas.zero(along="x")
    canvas.scale("x", [0.0, 100.0], margin=0)
    canvas.scale("y", [0.0, *saved])
    canvas.axes.grid(axis="y")
    canvas.axes.set(xlabel="share of the users (%)", ylabel=f"{_NATS} saved by own")
    return canvas.chart("gain by user", {"own": "own against another user's"})


@style()
def forest(rows: Sequence[ForestRow], *, x: str) -> Chart | None:
    """A line with a dot and its interval for each row, from the top down (see `leaves_out_bare`). Lower is better."""
    if leaves_out_bare(row.persona for row in rows):
        rows = [row for row in rows if row.persona != "bare"]
    if not rows:
        return None
    canvas = _canvas(height=1.0 + _ROW_HEIGHT * len(rows))
    values = [0.0]
    for i, row in enumerate(rows):
        values += _mark(canvas, row.interval, along="x", place=i, color=series(row.persona), label=row.label)
    canvas.zero(along="y")
    canvas.scale("x", values, ticks=4)
    canvas.axes.set_yticks(range(len(rows)), [_shortened(row.label) for row in rows])
    canvas.axes.set_ylim(len(rows) - 0.5, -0.5)
    canvas.axes.grid(axis="x")
    canvas.axes.set(xlabel=x)
    return canvas.chart(x, {series(row.persona): row.persona for row in rows})


@style()
def layer_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, y: str, chance: Mapping[str, Sequence[tuple[float, float]]]
) -> Chart | None:
    """A number by layer, a curve each of at most `CURVES_A_CHART` groups, and thin grey curves of what chance gives."""
    found = {name: points for name, points in curves.items() if points}
    if not found:
        return None
    canvas = _canvas()
    by_chance = [points for points in chance.values() if points]
    for points in by_chance:
        _curve(canvas, points, color="quiet", width=0.8)
    legend = {}
    for color, (name, points) in zip(_CURVE_COLORS, found.items(), strict=False):
        _curve(canvas, points, color=color, width=2)
        legend[color] = name
    every = [point for points in (*found.values(), *by_chance) for point in points]
    canvas.scale("x", [x for x, _ in every], margin=0.02)
    canvas.scale("y", [y for _, y in every])
    canvas.axes.grid(axis="y")
    canvas.axes.set(xlabel="layer", ylabel=y)
    return canvas.chart(f"{y} by layer", legend | ({"quiet": "by chance"} if by_chance else {}))


@style()
def plug_versions(found: Mapping[str, Any] | None) -> Chart | None:
    """The loss of each version of a plug with its interval, from the first to the one of the page. Lower is better."""
    if not found:
        return None
    canvas = _canvas()
    values: list[float] = []
    rows = found["rows"]
    for i, row in enumerate(rows):
        color = _STAGE_COLORS.get(row["stage"], "mean")
        values += _mark(canvas, row["loss"], along="y", place=i, color=color, label=formats.version(row))
    canvas.scale("y", values)
    canvas.axes.set_xticks(range(len(rows)), [formats.version(row) for row in rows])
    canvas.axes.set_xlim(-0.5, len(rows) - 0.5)
    canvas.axes.grid(axis="y")
    canvas.axes.set(xlabel="version of the plug", ylabel=f"{_NATS}, own persona")
    legend = {_STAGE_COLORS.get(row["stage"], "mean"): formats.stage(row) for row in rows}
    return canvas.chart("loss by version of the plug", legend)


def leaves_out_bare(kinds: Iterable[str]) -> bool:
    """Whether charts of these kinds leave out `bare`: the gap to it is so large that the others would collapse."""
    found = set(kinds)
    return "bare" in found and found != {"bare"}


def _canvas(height: float = _HEIGHT) -> _Canvas:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return _Canvas(figure=figure, axes=figure.add_subplot())


def _mark(canvas: _Canvas, interval: Interval, *, along: str, place: float, color: str, label: str) -> list[float]:
    """A dot with its interval at a place across the axis `along`; returns the values that the axis has to cover."""
    mean = interval["mean"]
    x, y = (mean, place) if along == "x" else (place, mean)
    values = [mean]
    if formats.has_bounds(interval):
        values += [interval["low"], interval["high"]]
        canvas.interval(x, y, (interval["low"], interval["high"]), along=along, color=color)
    hollow = formats.verdict(interval) in ("noise", "unknown")
    canvas.dot(x, y, color=color, hollow=hollow, title=f"{label}: {mean:.4f} {formats.bounds(interval)}")
    return values


def _curve(canvas: _Canvas, points: Sequence[tuple[float, float]], *, color: str, width: float) -> None:
    xs, ys = zip(*points, strict=True)
    marker = "o" if len(points) <= 30 else ""
    canvas.axes.plot(
        xs, ys, color=LIGHT[color], linewidth=width, marker=marker, markersize=5, clip_on=False, gid=f"line {color}#"
    )


def _thinned(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    size = max(1, math.ceil(len(points) / _LINE_POINTS))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]


def _broken(span: str) -> str:
    """A long range on two lines, so that it does not run into its neighbors."""
    return span.replace("–", "–\n") if len(span) > _LONGEST_SPAN else span


def _shortened(label: str) -> str:
    """A label that fits beside the axis and into XML."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in label)
    return shown if len(shown) <= _LONGEST_LABEL else f"{shown[: _LONGEST_LABEL - 1]}…"


def _tick(value: float, _position: int | None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
