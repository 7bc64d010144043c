"""Publish a plug with its card on the Hugging Face hub, or in a folder with the files that the hub would have.

Reads `--plug`. Writes its three files, the card with the metadata that the hub reads, to `--to`. Other jobs load it
from there with `--plug hf://OWNER/NAME`. The token of the hub comes from its own settings (`hf auth login`, HF_TOKEN).
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jobs.runtime import cli
from jobs.runtime.cli import Summary
from jobs.runtime.plugs import PlugRef, read_plug
from persona.errors import StorageError, UsageError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.push."""

    plug: str
    """Folder of the plug made by jobs.train, local or s3://; or `live`, the live plug of --store."""
    to: str
    """Where to: hf://OWNER/NAME, or a folder, local or s3://."""
    store: str | None = None
    """With --plug live: folder of the store whose live plug is published."""
    license: str | None = None
    """License of the plug as the hub names it, like apache-2.0 or cc-by-nc-4.0."""
    base_model: str | None = None
    """Hub id of the plug's LLM, if the plug was trained with a folder."""
    public: bool = False
    """Let everyone see a repository that is created; default only its owner. An existing one stays as it is."""
    dry_run: bool = False
    """Print the card, and publish nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if (self.store is None) == (self.plug == "live"):
            raise UsageError("--store goes with --plug live, and --plug live needs --store")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.plug import hub
    from persona.store.store import Store

    target = config.to if hub.is_hub(config.to) else storage.check_uri(config.to, flag="--to")
    if hub.is_hub(target):
        hub.parse(target, flag="--to")
    else:
        storage.check_reachable(target, flag="--to", write=True)
    store = None if config.store is None else Store.open(storage.check_uri(config.store, flag="--store"))
    plug = read_plug(config.plug, store=store)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "plug"
        card = _stage(config, plug, staged)
        if config.dry_run:
            would = f"publish {plug.uri} ({plug.fingerprint[:12]}) to {target}"
            return Summary(table=[("would", would)], result={"dry_run": True, "would": would, "card": card})
        place = _upload(config, staged, target) if hub.is_hub(target) else _copy(staged, target)
    result = {"job": "push", "plug": plug.uri, "fingerprint": plug.fingerprint, "to": place}
    return Summary(table=[("plug", f"{plug.uri} ({plug.fingerprint[:12]})"), ("published", place)], result=result)


def _stage(config: Config, plug: PlugRef, target: Path) -> str:
    """Copies the plug to a folder, with a card for the hub; returns the card."""
    from persona.plug.hub_card import with_metadata
    from persona.plug.record import CARD, RECORD, WEIGHTS

    target.mkdir()
    with plug.folder() as folder:
        for name in (WEIGHTS, RECORD, CARD):
            shutil.copyfile(folder / name, target / name)
    text = (target / CARD).read_text()
    card = with_metadata(text, plug.record, license_id=config.license, base_model=config.base_model)
    (target / CARD).write_text(card)
    return card


def _copy(staged: Path, target: str) -> str:
    from persona import storage

    storage.copy_folder(str(staged), target)
    return target


def _upload(config: Config, staged: Path, target: str) -> str:
    """Uploads the folder in one commit; returns the address with the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from persona.plug import hub

    repository, revision = hub.parse(target, flag="--to")
    try:
        api = HfApi(library_name="persona-plug")
        api.create_repo(repository, private=not config.public, exist_ok=True)
        message = f"Plug {config.plug.rstrip('/').rsplit('/', 1)[-1]}"
        done = api.upload_folder(repo_id=repository, folder_path=staged, revision=revision, commit_message=message)
    except (HfHubHTTPError, OfflineModeIsEnabled, ValueError, OSError) as error:
        raise StorageError(
            f"--to {target}: the hub did not take the plug ({str(error).strip().splitlines()[0][:300]}); check "
            "HF_TOKEN and its rights, the network and HF_HUB_OFFLINE"
        ) from error
    return f"{hub.SCHEME}{repository}@{done.oid}"


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
