"""Charts as SVG text, to stand inside a page: colors come from the page's style, so that light and dark both work.

A mark's class names its series: `own`, `none`, `other`, `mean`, or `train` and `held-out`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 56
_LEFT_OF_FOREST, _ROW_HEIGHT = 150, 26
_LINE_POINTS = 200

Triple = tuple[float, float, float]  # a mean, and the ends of its interval


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Values to pixels, and the round values that are marked."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, n: int = 5) -> list[float]:
        rough = (self.high - self.low) / n
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(series: Mapping[str, Sequence[Sequence[float]]], *, x: str, y: str, zero: bool = False) -> str:
    """Curves of (x, y) points, perhaps with a line at zero; a long curve is thinned to means of neighbors."""
    curves = {name: _thinned(points) for name, points in series.items() if points}
    if not curves:
        return ""
    every = [point for points in curves.values() for point in points]
    across = _horizontal([point[0] for point in every], margin=0)
    up = _vertical([*(point[1] for point in every), *([0.0] if zero else [])])
    parts = [_frame(across, up, x=x, y=y), *([_zero(up)] if zero else [])]
    for name, points in curves.items():
        places = " ".join(f"{across.at(a)},{up.at(b)}" for a, b in points)
        parts.append(f'<polyline class="line {name}" points="{places}"/>')
        if len(points) <= 30:
            parts += [f'<circle class="dot {name}" cx="{across.at(a)}" cy="{up.at(b)}" r="3"/>' for a, b in points]
    return _svg(parts, f"{y} over {x}")


def groups(rows: Sequence[tuple[str, Mapping[str, Triple]]], *, x: str, y: str) -> str:
    """For each group, side by side, a dot with its interval for each series; a line at zero."""
    if not rows:
        return ""
    values = [value for _, of in rows for triple in of.values() for value in triple if math.isfinite(value)]
    up = _vertical([0.0, *values])
    step = (_WIDTH - _LEFT - _RIGHT) / len(rows)
    parts = [_frame(None, up, x=x, y=y), _zero(up)]
    for i, (label, of) in enumerate(rows):
        center = _LEFT + (i + 0.5) * step
        # A range stands in two lines, so that neighbors do not run into each other.
        for n, part in enumerate(label.replace("–", "–\n").split("\n")):
            parts.append(f'<text x="{center:.1f}" y="{_HEIGHT - _BOTTOM + 17 + 14 * n}">{escape(part)}</text>')
        for k, (name, (mean, low, high)) in enumerate(of.items()):
            place = center + (k - (len(of) - 1) / 2) * min(14.0, step / (len(of) + 1))
            if math.isfinite(low) and math.isfinite(high):
                parts.append(
                    f'<line class="whisker {name}" x1="{place:.1f}" x2="{place:.1f}" y1="{up.at(low)}" '
                    f'y2="{up.at(high)}"/>'
                )
            title = f"<title>{escape(f'{name}, {label}: {mean:.4f} [{low:.4f}, {high:.4f}]')}</title>"
            parts.append(f'<circle class="dot {name}" cx="{place:.1f}" cy="{up.at(mean)}" r="4.5">{title}</circle>')
    return _svg(parts, f"{y} by {x}")


def forest(rows: Sequence[tuple[str, str, Triple]], *, x: str) -> str:
    """For each row (label, series, triple), from the top down, a dot with its interval; a line at zero."""
    if not rows:
        return ""
    low, high = _spread([0.0, *(value for *_, of in rows for value in of if math.isfinite(value))], 0.06)
    height = _TOP + _ROW_HEIGHT * len(rows) + _BOTTOM
    bottom = height - _BOTTOM
    across = _Axis(low=low, high=high, start=_LEFT_OF_FOREST, end=_WIDTH - _RIGHT)
    parts = []
    for value in across.ticks(4):
        place = across.at(value)
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 18}">{_short(value)}</text>')
    parts.append(f'<line class="zero" x1="{across.at(0)}" x2="{across.at(0)}" y1="{_TOP}" y2="{bottom}"/>')
    for i, (label, name, (mean, least, most)) in enumerate(rows):
        place = _TOP + (i + 0.5) * _ROW_HEIGHT
        parts.append(f'<text class="end" x="{_LEFT_OF_FOREST - 9}" y="{place + 4:.1f}">{escape(label)}</text>')
        if math.isfinite(least) and math.isfinite(most):
            ends = f'x1="{across.at(least)}" x2="{across.at(most)}"'
            parts.append(f'<line class="whisker {name}" {ends} y1="{place:.1f}" y2="{place:.1f}"/>')
        title = f"<title>{escape(f'{label}: {mean:.4f} [{least:.4f}, {most:.4f}]')}</title>"
        parts.append(f'<circle class="dot {name}" cx="{across.at(mean)}" cy="{place:.1f}" r="4.5">{title}</circle>')
    middle = (_LEFT_OF_FOREST + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}">{escape(x)}</text>')
    return _svg(parts, x, height=height)


def cloud(points: Sequence[tuple[float, float, float, str]], *, x: str, y: str) -> str:
    """Points (x, y, value, title): colored by the sign of the value, stronger the larger it is."""
    if not points:
        return ""
    across = _horizontal([point[0] for point in points], margin=0.06)
    up = _vertical([point[1] for point in points])
    sizes = sorted(abs(point[2]) for point in points)
    # One user far out must not leave all others pale.
    strongest = max(sizes[int(0.95 * (len(sizes) - 1))], 1e-12)
    parts = [_frame(across, up, x=x, y=y, marked=False)]
    for a, b, value, title in sorted(points, key=lambda point: abs(point[2])):
        kind = "gain" if value >= 0 else "loss"
        strength = 0.25 + 0.75 * min(abs(value) / strongest, 1.0)
        parts.append(
            f'<circle class="point {kind}" cx="{across.at(a)}" cy="{up.at(b)}" r="5" fill-opacity="{strength:.2f}">'
            f"<title>{escape(title)}</title></circle>"
        )
    return _svg(parts, f"{y} against {x}")


def _thinned(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _LINE_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]


def _horizontal(values: Sequence[float], margin: float) -> _Axis:
    low, high = _spread(values, margin)
    return _Axis(low=low, high=high, start=_LEFT, end=_WIDTH - _RIGHT)


def _vertical(values: Sequence[float]) -> _Axis:
    low, high = _spread(values, 0.06)
    return _Axis(low=low, high=high, start=_HEIGHT - _BOTTOM, end=_TOP)


def _spread(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = margin * (high - low) if high > low else max(abs(high), 1.0) * 0.5
    return low - room, high + room


def _frame(across: _Axis | None, up: _Axis, *, x: str, y: str, marked: bool = True) -> str:
    """Grid, marks and names of the axes; no `across` for groups, which name themselves."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    rows = [(_short(value), up.at(value)) for value in (up.ticks() if marked else ())]
    columns = [(_short(value), across.at(value)) for value in across.ticks()] if across is not None and marked else []
    parts = [f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}"/>' for _, place in rows]
    parts += [f'<text class="end" x="{_LEFT - 7}" y="{place + 4:.1f}">{text}</text>' for text, place in rows]
    parts += [f'<text x="{place}" y="{bottom + 18}">{text}</text>' for text, place in columns]
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    if not marked:
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{bottom}"/>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}">{escape(x)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)">{escape(y)}</text>')
    return "".join(parts)


def _zero(up: _Axis) -> str:
    return f'<line class="zero" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up.at(0)}" y2="{up.at(0)}"/>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _svg(parts: Iterable[str], label: str, *, height: int = _HEIGHT) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>'
