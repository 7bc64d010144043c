"""Charts draw each mark at its value, and the SVG in a page is self-contained."""

import re
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest

from persona.report import charts, drawing
from persona.report.drawing import Chart
from persona.report.palette import DARK, LIGHT

ONE_USER = {"mean": 2.0, "low": float("nan"), "high": float("nan")}


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def drawn(chart: Chart | None) -> Element:
    assert chart is not None
    return fromstring(str(drawing.svg(chart)))


def marks(chart: Element, name: str) -> list[Element]:
    """The elements of one class, in the order of drawing."""
    return [one for one in chart if one.get("class") == name]


def position(dot: Element) -> tuple[float, float]:
    x, y = re.findall(r"[-\d.]+", dot.get("transform", ""))
    return float(x), float(y)


def zero(chart: Element) -> tuple[float, float]:
    """Where the line at zero starts."""
    _, x, y, *_ = marks(chart, "zero")[0].get("d", "").split()
    return float(x), float(y)


def group(first: int, last: int, **saved: dict[str, float]) -> dict[str, Any]:
    return {"from": first, "to": last, "saved_by_own": saved}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 37.0, 1e5])
def test_ticks_are_few_round_numbers_within_the_axis(scale: float) -> None:
    values = [0.13 * scale, 0.91 * scale]
    chart = drawn(charts.training_curves({"validation_curve": [[0, values[0]], [10, values[1]]]}))
    texts = [one.text or "" for one in chart.iter("text") if "text-anchor: end" in one.get("style", "")]
    ticks = [float(text.replace(",", "")) for text in texts]
    assert 3 <= len(ticks) <= 7
    assert all(values[0] - 0.1 * scale <= tick <= values[1] + 0.1 * scale for tick in ticks)


def test_a_dot_is_at_its_value() -> None:
    rows = [group(1, 2, other=interval(1.0, 0.5, 2.0)), group(3, 3, other=ONE_USER)]
    chart = drawn(charts.gain_by_history_length(rows))
    (_, first), (_, second) = map(position, marks(chart, "dot other"))
    _, at_zero = zero(chart)
    assert (at_zero - second) / (at_zero - first) == pytest.approx(2, rel=0.01)
    # A single user has no interval, so no whisker.
    assert len(marks(chart, "whisker other")) == 1
    assert [dot.findtext("title") for dot in marks(chart, "dot other")] == [
        "1–2, against other: 1.0000 [0.5000, 2.0000]",
        "3, against other: 2.0000 –",
    ]


def test_each_row_of_a_forest_has_its_dot_at_the_value() -> None:
    rows = [
        charts.ForestRow(label="a/none", persona="none", interval=interval(1.0, 0.5, 2.0)),
        charts.ForestRow(label="b/own", persona="own", interval=interval(-1.0, -2.0, -0.5)),
    ]
    chart = drawn(charts.forest(rows, x="nats"))
    (first, upper), (second, lower) = (position(marks(chart, f"dot {kind}")[0]) for kind in ("none", "own"))
    at_zero, _ = zero(chart)
    assert first - at_zero == pytest.approx(at_zero - second, abs=0.2)
    assert upper < lower
    assert len(marks(chart, "whisker none") + marks(chart, "whisker own")) == 2
    assert charts.forest([], x="nats") is None


def test_a_long_curve_is_thinned_to_means() -> None:
    chart = drawn(charts.training_curves({"training_curve": [[step, 1.0 + step % 2] for step in range(10_000)]}))
    points = re.findall(r"[-\d.]+ ([-\d.]+)", marks(chart, "line none")[0].get("d", ""))
    assert len(points) == 200
    assert len(set(points)) == 1


def test_a_dot_whose_interval_includes_zero_is_hollow() -> None:
    rows = [
        group(1, 1, other=interval(1.0, 0.5, 2.0)),
        group(2, 2, other=interval(0.1, -0.5, 0.7)),
        group(3, 3, other=ONE_USER),
    ]
    chart = charts.gain_by_history_length(rows)
    assert chart is not None and chart.has_noise
    filled, *hollow = (dot.get("style", "") for dot in marks(drawn(chart), "dot other"))
    assert "fill: var(--other)" in filled
    assert all("fill: var(--card)" in style and "stroke: var(--other)" in style for style in hollow)
    clear = charts.gain_by_history_length(rows[:1])
    assert clear is not None and not clear.has_noise


def test_bare_is_left_out_of_a_chart_that_has_other_kinds() -> None:
    near, far = interval(0.01, 0.005, 0.02), interval(3.0, 2.9, 3.1)
    chart = charts.gain_by_history_length([group(1, 1, other=near, bare=far)])
    assert chart is not None and list(chart.legend) == ["other"]
    rows = [
        charts.ForestRow(label=f"a/{kind}", persona=kind, interval=one) for kind, one in (("none", near), ("bare", far))
    ]
    assert not marks(drawn(charts.forest(rows, x="nats")), "dot bare")
    assert marks(drawn(charts.forest(rows[1:], x="nats")), "dot bare")


def test_the_strongest_colors_of_the_map_are_the_largest_gains() -> None:
    users = [
        {"user_id": f"u{i}", "x": i, "y": i, "saved": saved, "n_behaviors": 1}
        for i, saved in enumerate((0.1, 2.0, -1.0))
    ]
    chart = drawn(charts.persona_map(users))
    opacity = {
        dot.findtext("title", "")[:2]: float(re.findall(r"fill-opacity: ([\d.]+)", dot.get("style", ""))[0])
        for dot in chart
        if dot.get("class") in ("dot gain", "dot loss") and "fill-opacity" in dot.get("style", "")
    }
    assert opacity["u0"] < 0.4
    assert opacity.get("u1", 1.0) == opacity.get("u2", 1.0) == 1.0


def test_the_svg_has_only_colors_of_the_page_and_no_references_or_ids() -> None:
    users = [{"user_id": "u", "x": 0, "y": 1, "saved": 0.5, "n_behaviors": 1}]
    found = [
        charts.persona_map(users),
        charts.gain_by_user(users),
        charts.training_curves({"training_curve": [[1, 5.0], [2, 4.0]]}),
        charts.gain_by_history_length([group(1, 1, other=interval(1.0, 0.5, 2.0))]),
    ]
    for chart in found:
        assert chart is not None
        text = str(drawing.svg(chart))
        assert not re.search(r"#[0-9a-f]{3}|href|url\(|xmlns|\bid=|font-family", text)
        assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(LIGHT)


def test_both_palettes_name_the_same_colors_and_the_light_ones_differ() -> None:
    assert list(LIGHT) == list(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize("label", ["<b>&\"'", "$x_1$", "日本", "a\x00b\nc", "x" * 200])
def test_any_label_can_be_drawn(label: str) -> None:
    row = charts.ForestRow(label=label, persona="own", interval=interval(1.0, 0.5, 2.0))
    chart = charts.forest([row], x="nats")
    assert chart is not None
    text = str(drawing.svg(chart))
    assert "<b>" not in text
    # HTML parsers accept the control characters of a tooltip, and the drawn label has none.
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert all(one.isprintable() and len(one) <= 60 for one in texts)
    assert drawing.png(chart).startswith(b"\x89PNG")
