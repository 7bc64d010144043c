"""Run files of killed runs are deleted by the next holder of the lease, and no other run's files with them."""

from persona.exchange import leftovers
from persona.storage import join, list_files, write_bytes


def left(root: str) -> set[str]:
    return {file.uri for file in list_files(join(root, leftovers.FOLDER), hidden=True)}


def test_only_the_run_files_of_one_writer_are_deleted(root: str) -> None:
    folders = {writer: leftovers.new_folder(root, writer) for writer in ("behaviors", "generations")}
    files = {writer: write(folder) for writer, folder in folders.items()}
    data = join(root, "behaviors/bucket=0/part.parquet")
    write_bytes(data, b"rows")
    assert leftovers.delete_leftovers(root, "behaviors") == 2
    assert left(root) == files["generations"]
    assert leftovers.delete_leftovers(root) == 2
    assert left(root) == set()
    assert [file.uri for file in list_files(root)] == [data]
    assert leftovers.delete_leftovers(root) == 0


def write(folder: str) -> set[str]:
    uris = {join(folder, name) for name in ("a.run", ".b.run.draft")}
    for uri in uris:
        write_bytes(uri, b"rows")
    return uris


def test_the_folder_of_a_run_that_has_ended_is_gone(root: str) -> None:
    folder = leftovers.new_folder(root, "behaviors")
    assert folder != leftovers.new_folder(root, "behaviors")
    write(folder)
    assert leftovers.delete_folder(folder) == 2
    assert list_files(root, hidden=True) == []
    assert leftovers.delete_folder(folder) == 0
