"""The wheel holds all that an installed persona-plug needs, and its front door works away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "jobs", "persona")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built from a copy so that the repository stays clean."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in NEEDED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of the installed package, in a folder that is not the repository."""
    command = [sys.executable, "-m", "jobs", *words]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["jobs", "persona"])
def test_wheel_holds_every_file_of_the_packages(installed: Path, package: str) -> None:
    files = (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    missing = [name for path in files if not (installed / (name := str(path.relative_to(ROOT)))).is_file()]
    assert not missing


def test_wheel_declares_the_console_script(installed: Path) -> None:
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "persona-plug = jobs.__main__:main" in entry_points.read_text()


def test_front_door_lists_the_jobs_away_from_the_repository(installed: Path) -> None:
    done = run(installed, "--help")
    assert done.returncode == 0
    assert "embed" in done.stdout and "make_requests" in done.stdout


def test_recipe_is_found_by_name_away_from_the_repository(installed: Path) -> None:
    # All settings come from the recipe, so what is missing are the paths.
    for recipe in ("lamp_4/paper", "small"):
        done = run(installed, "train", "--config", recipe)
        assert done.returncode == 2
        assert "--requests" in done.stderr and "is missing" in done.stderr
