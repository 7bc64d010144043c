"""The Markdown pages of the repository: their commands, Python blocks, links, headings and tables."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "cluster" / "README.md", *DOCS]
"""The pages that users follow."""
RESULTS = ROOT / "tests" / "benchmarks" / "RESULTS.md"
DATA = ROOT / "docs" / "data.md"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, *kinds: str) -> list[str]:
    """The fenced blocks of these kinds, such as `bash`."""
    return [block for kind, block in _FENCE.findall(page.read_text()) if kind in kinds]


def prose(page: Path) -> str:
    """The text outside the fenced blocks."""
    return _FENCE.sub("", page.read_text())


def shell_lines(page: Path) -> list[str]:
    """The commands of the shell blocks, one a line, without comments, output and prompts; `a && b` gives two."""
    lines = []
    for kind, block in _FENCE.findall(page.read_text()):
        if kind not in ("bash", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue
            command: list[str] = []
            for word in [*shlex.split(line.removeprefix("$ "), comments=True), "&&"]:
                if word != "&&":
                    command.append(word)
                elif command:
                    lines.append(shlex.join(command))
                    command = []
    return lines


def section(page: Path, heading: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    return page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def python_blocks(text: str) -> list[str]:
    """The Python blocks of a text."""
    return [block for kind, block in _FENCE.findall(text) if kind == "python"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        n_before = sum(one == slug for one in found)
        found.append(f"{slug}-{n_before}" if n_before else slug)
    return set(found)


def links(page: Path) -> list[tuple[Path, str]]:
    """Links to other files of the repository, or within the page: the file, and the anchor or nothing."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    pairs = [target.partition("#")[::2] for target in targets if "://" not in target]
    return [((page.parent / path).resolve() if path else page, anchor) for path, anchor in pairs]


def tables(page: Path) -> list[list[list[str]]]:
    """The tables as rows of cells, the heading first."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose(page), re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()] for table in found]
