"""`push`: a plug on a hub, with a card that the hub's library reads, and the same plug loaded by its id."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from jobs import push
from jobs.runtime.plugs import read_plug
from persona.errors import InputError, UsageError
from persona.plug import record as plug_record
from persona.storage import local_folder
from tests import hub
from tests.jobs.conftest import Job, arguments
from tests.pages import ROOT

NAME = "corp/our-plug"
FILES = {"README.md", "plug.json", "plug.safetensors"}


@pytest.fixture(scope="module")
def server() -> Iterator[hub.Hub]:
    with hub.running() as found:
        yield found


def on_hub(server: hub.Hub, home: Path, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """A Python whose hub is the server."""
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_test"}
    environment |= {"HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_plug_is_pushed_and_loaded_by_its_id(server: hub.Hub, plug: str, tmp_path: Path) -> None:
    flags = arguments(plug=plug, to=f"hf://{NAME}", license="apache-2.0", base_model="HuggingFaceTB/SmolLM2-135M")
    pushed = on_hub(server, tmp_path / "a", "-m", "jobs.push", *flags)
    assert pushed.returncode == 0, pushed.stderr
    assert server.files[NAME].keys() == FILES
    assert server.private == {NAME}
    assert server.tokens == {"Bearer hf_test"}
    read = f"from jobs.runtime.plugs import read_plug; p = read_plug('hf://{NAME}'); print(p.uri, p.fingerprint)"
    expected = f"hf://{NAME}@{server.commits[NAME]} {plug_record.fingerprint(Path(plug))}\n"
    for offline in (False, True):  # the second time from the cache
        loaded = on_hub(server, tmp_path / "b", "-c", read, offline=offline)
        assert loaded.stdout == expected, loaded.stderr
    missing = on_hub(server, tmp_path / "b", "-c", read.replace(NAME, "corp/none"))
    assert "the hub has no such plug" in missing.stderr


def test_a_folder_in_the_form_of_the_hub(refuse: Job, plug: str, root: str) -> None:
    done = refuse(push, plug=plug, to=f"{root}/published", license="apache-2.0", base_model="corp/llm")
    assert done.code == 0
    assert read_plug(f"{root}/published").fingerprint == plug_record.fingerprint(Path(plug))
    with local_folder(f"{root}/published") as folder:
        assert {path.name for path in folder.iterdir()} == FILES
        found = metadata_load(folder / "README.md")
        card = ModelCard.load(folder / "README.md")
    assert found == {
        "base_model": "corp/llm",
        "base_model_relation": "adapter",
        "library_name": "persona-plug",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["persona-plug", "personalization", "soft-prompt"],
    }
    assert card.data.to_dict() == found
    assert card.text.strip() == "a plug for tests"
    again = refuse(push, plug=f"{root}/published", to=f"{root}/again", dry_run=True)
    assert again.result["card"].count("---\n") == 2, "metadata twice"
    assert yaml.safe_load(again.result["card"].split("---\n")[1])["library_name"] == "persona-plug"


def test_what_cannot_be_pushed_or_found_is_refused(refuse: Job, plug: str, tmp_path: Path) -> None:
    done = refuse(push, plug=plug, to="hf://no-owner")
    assert done.code == 2 and "must be hf://OWNER/NAME" in done.said
    done = refuse(push, plug="live", to=str(tmp_path / "out"))
    assert done.code == 2 and "--plug live needs --store" in done.said
    done = refuse(push, plug=plug, to=f"hf://{NAME}")
    assert done.code == 1 and "the hub did not take the plug" in done.said  # the tests are offline
    with pytest.raises(InputError, match="the hub has no such plug"):
        read_plug("hf://corp/never-seen")
    with pytest.raises(UsageError, match="must be hf://OWNER/NAME"):
        read_plug("hf://corp")
