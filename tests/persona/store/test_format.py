"""The format version of a store: recorded, 1 if missing, refused if newer."""

from dataclasses import replace

import pytest
from deltalake import DeltaTable

from persona.errors import InputError, StoreMismatch
from persona.storage import delta_options, join
from persona.store.identity import describe_difference, from_properties, to_properties
from persona.store.schema import FORMAT_VERSION
from persona.store.store import Store
from tests.stores import IDENTITY, behaviors, everything, refresh


def behaviors_table(store: Store) -> DeltaTable:
    uri = join(store.uri, "behaviors")
    return DeltaTable(uri, storage_options=delta_options(uri))


def set_format(store: Store, value: str) -> None:
    behaviors_table(store).alter.set_table_properties({"persona.format": value}, raise_if_not_exists=False)


def test_a_new_store_records_its_format_version(store: Store) -> None:
    assert behaviors_table(store).metadata().configuration["persona.format"] == str(FORMAT_VERSION)


def test_a_store_without_a_format_version_has_version_1(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_format(*args: object) -> dict[str, str]:
        return {name: value for name, value in to_properties(*args).items() if name != "persona.format"}

    monkeypatch.setattr("persona.store.identity.to_properties", without_format)
    old = Store.create(store.uri + "-old", IDENTITY, 4)
    assert "persona.format" not in behaviors_table(old).metadata().configuration
    with monkeypatch.context() as patch:
        patch.setattr("persona.store.identity.FORMAT_VERSION", 0)
        with pytest.raises(StoreMismatch, match="has format version 1,"):
            Store.open(old.uri)
    opened = Store.find(old.uri, IDENTITY, 4)
    assert opened is not None
    refresh(opened, behaviors(("a", "1", "x", 1)))
    assert everything(Store.open(old.uri)) == [("a", "1", 1)]


def test_the_first_writer_of_behaviors_raises_the_format_version(store: Store) -> None:
    """Older versions would delete data files and leave their key indexes."""
    set_format(store, "1")
    refresh(Store.open(store.uri), behaviors(("a", "1", "x", 1)))
    assert behaviors_table(store).metadata().configuration["persona.format"] == str(FORMAT_VERSION)
    version = store.version("behaviors")
    refresh(store, behaviors(("a", "2", "x", 1)))
    assert store.version("behaviors") == version + 2  # the lease and the rows


def test_a_store_of_a_newer_format_is_refused_with_what_to_do(store: Store) -> None:
    refresh(store, behaviors(("a", "1", "x", 1)))
    newer = FORMAT_VERSION + 1
    set_format(store, str(newer))
    version = behaviors_table(store).version()
    message = (
        rf"the table .*behaviors has format version {newer}, but this version of persona-plug supports only versions "
        rf"up to {FORMAT_VERSION}; upgrade persona-plug"
    )
    for use in (
        lambda: Store.open(store.uri),
        lambda: Store.find(store.uri, IDENTITY),
        lambda: Store.create(store.uri, IDENTITY, 4),
    ):
        with pytest.raises(StoreMismatch, match=message):
            use()
    assert behaviors_table(store).version() == version


def test_a_newer_format_is_reported_even_if_its_other_properties_are_unknown() -> None:
    with pytest.raises(StoreMismatch, match="format version 7"):
        from_properties({"persona.format": "7", "persona.model": "tiny"}, "table")


@pytest.mark.parametrize("name", ["format", "width", "buckets"])
def test_a_malformed_property_is_an_input_error(name: str) -> None:
    properties = {**to_properties(IDENTITY, 4), f"persona.{name}": "many"}
    with pytest.raises(InputError, match=r"the table s3://b/t has a malformed persona\.\* property: .*'many'"):
        from_properties(properties, "s3://b/t")


def test_a_store_from_before_prompts_has_none() -> None:
    properties = to_properties(IDENTITY, 4)
    del properties["persona.document_prompt"]
    assert from_properties(properties, "") == (IDENTITY, 4)
    assert IDENTITY.document_prompt == ""


def test_another_prompt_is_another_identity() -> None:
    prompted = replace(IDENTITY, document_prompt="passage: ")
    difference = describe_difference(IDENTITY, 4, prompted, 4)
    assert difference == "document_prompt is '' in the store and 'passage: ' here"
    assert "prompt 'passage: '" in prompted.describe()


def test_properties_convert_back() -> None:
    prompted = replace(IDENTITY, document_prompt="title: none | text: ")
    assert from_properties(to_properties(prompted, 5), "") == (prompted, 5)
    assert from_properties({**to_properties(IDENTITY, 5), "delta.appendOnly": "false"}, "") == (IDENTITY, 5)
