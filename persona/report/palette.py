"""The colors of pages and charts, by name; the page's style sheet and its charts use them as CSS variables."""

# Charts are drawn in the light colors and recolored by value, so these must all differ.
LIGHT = {
    "paper": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#1d2126",
    "quiet": "#646b75",
    "line": "#e2dfd8",
    "grid": "#eceae4",
    "own": "#2563c9",
    "other": "#c9541b",
    "mean": "#12826f",
    "none": "#7b7f87",
    "bare": "#7d4fb3",
    "gain": "#1d7a48",
    "loss": "#b93131",
    "warn": "#fff3d6",
    "warn-ink": "#6b4a00",
}
DARK = {
    "paper": "#14171b",
    "card": "#1c2026",
    "ink": "#e8e6e1",
    "quiet": "#9aa1ab",
    "line": "#30363e",
    "grid": "#272c33",
    "own": "#74a8ff",
    "other": "#ff9a63",
    "mean": "#4fcbb3",
    "none": "#a3a8b1",
    "bare": "#c39bf0",
    "gain": "#5fd08f",
    "loss": "#ff8080",
    "warn": "#3b2f10",
    "warn-ink": "#ffdf8f",
}

_SERIES = ("own", "other", "mean", "none", "bare")


def series(kind: str) -> str:
    """The color of a kind of persona, or of a variant like own-bm25-4; unknown ones have that of `none`."""
    first = kind.split("-", maxsplit=1)[0]
    return first if first in _SERIES else "none"
