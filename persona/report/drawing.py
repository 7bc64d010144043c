"""A chart as SVG inside a page, and as a PNG file."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

from markupsafe import Markup

from persona.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG_DPI = 240
_LEGEND_COLUMNS = 3
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "path.simplify": False,
    "font.size": 11,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["quiet"],
    "axes.axisbelow": True,
    "text.color": LIGHT["quiet"],
    "xtick.color": LIGHT["quiet"],
    "ytick.color": LIGHT["quiet"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": LIGHT["grid"],
    "legend.frameon": False,
    "legend.handletextpad": 0.1,
    "legend.columnspacing": 1.2,
}
_VARIABLES = {color: f"var(--{name})" for name, color in LIGHT.items()}
_HOLLOW = "hollow: noise"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with what a page shows along with it."""

    figure: "Figure"
    description: str
    """What the chart shows, for screen readers."""
    legend: Mapping[str, str]
    """The name of each series by its color."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """The tooltips of marks by their gid, which is `CLASS#NUMBER`."""
    has_noise: bool = False
    """Whether some dots are hollow."""


@contextmanager
def style() -> Iterator[None]:
    """The look of all charts, whatever matplotlib's configuration on this machine; figures are made and saved in it."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        # The browser has fonts for what matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def png(chart: Chart) -> bytes:
    """The chart with its legend as a PNG file."""
    from matplotlib.lines import Line2D

    def dot(color: str, label: str, *, face: str | None = None) -> Line2D:
        return Line2D([], [], color=color, marker="o", linestyle="", markerfacecolor=face or color, label=label)

    handles = [dot(LIGHT[color], label) for color, label in chart.legend.items()]
    if chart.has_noise:
        handles.append(dot(LIGHT["ink"], _HOLLOW, face=LIGHT["card"]))
    with style():
        chart.figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), _LEGEND_COLUMNS))
        sink = io.BytesIO()
        chart.figure.savefig(sink, format="png", dpi=_PNG_DPI)
    return sink.getvalue()


def svg(chart: Chart) -> Markup:
    """The chart as an `<svg>` element: its colors are the page's CSS variables, and it refers to nothing outside."""
    sink = io.BytesIO()
    with style():
        chart.figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    drawn = fromstring(sink.getvalue())  # noqa: S314 - written by matplotlib a line above
    markers = {f"#{one.get('id')}": one for one in drawn.iter(_tag("path")) if one.get("id")}
    page_svg = Element("svg", {"viewBox": drawn.get("viewBox", ""), "role": "img", "aria-label": chart.description})
    _copy(drawn, page_svg, markers, chart.titles, gid="")
    return Markup(tostring(page_svg, encoding="unicode"))  # noqa: S704 - the serializer escapes texts and attributes


def _copy(
    source: Element, target: Element, markers: Mapping[str, Element], titles: Mapping[str, str], *, gid: str
) -> None:
    """Copies what is visible in matplotlib's SVG: paths, texts and markers, without ids, definitions and namespaces."""
    for one in source:
        if one.tag == _tag("g"):
            _copy(one, target, markers, titles, gid=one.get("id", "") if "#" in one.get("id", "") else gid)
        elif one.tag == _tag("use"):
            marker = markers[one.get("{http://www.w3.org/1999/xlink}href", "")]
            place = f"translate({_short(one.get('x', ''))} {_short(one.get('y', ''))})"
            css = f"{marker.get('style', '')}; {one.get('style', '')}"
            _add(target, "path", {"d": marker.get("d", ""), "style": css}, gid, titles, transform=place)
        elif one.tag == _tag("text"):
            _add(target, "text", dict(one.attrib), gid, titles).text = one.text
        elif one.tag == _tag("path") and one.get("style") != "fill: none":
            _add(target, "path", dict(one.attrib), gid, titles)


def _add(
    target: Element, tag: str, found: Mapping[str, str], gid: str, titles: Mapping[str, str], **more: str
) -> Element:
    kept = {name: _short(found[name]) for name in ("x", "y", "transform", "d") if name in found}
    one = SubElement(target, tag, {**kept, **more, "style": _restyled(found.get("style", ""))})
    if gid:
        one.set("class", gid.split("#", maxsplit=1)[0])
    if gid in titles:
        SubElement(one, "title").text = titles[gid]
    return one


def _restyled(css: str) -> str:
    """The inline style in the page's colors and font."""
    parts = [part.strip() for part in css.split(";") if part.strip() and "font-family" not in part]
    return "; ".join(re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), part) for part in parts)


def _short(text: str) -> str:
    """Numbers to one hundredth of a point, on one line."""
    return " ".join(re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text).split())


def _tag(name: str) -> str:
    return f"{{http://www.w3.org/2000/svg}}{name}"
