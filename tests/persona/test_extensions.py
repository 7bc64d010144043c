"""Modules found by name: unknown names are refused, other import errors are not hidden."""

import sys

import pytest

from persona.errors import UsageError
from persona.extensions import find


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """A package with one extension that works and one whose library is missing."""
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text("def load(): return 1\n")
    (folder / "broken.py").write_text("import a_library_that_is_missing\ndef load(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("some_package", "some_package.good", "some_package.broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "some_package"


def test_a_module_is_found_by_its_name(package):
    assert find(package, "good", required="load").load() == 1


@pytest.mark.parametrize(("name", "required"), [("bad", "load"), ("good", "scores"), ("good.load", "load")])
def test_an_unknown_name_is_refused(package, name, required):
    with pytest.raises(UsageError, match=f"unknown name '{name}': some_package has no .* that defines {required}"):
        find(package, name, required=required)


def test_a_missing_library_is_reported_as_such(package):
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        find(package, "broken", required="load")
