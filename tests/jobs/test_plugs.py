"""`plugs` on a real store, with plugs of tiny models: what becomes live, what is refused, and the way back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import forget, plugs
from jobs.runtime import plug_versions
from jobs.runtime.configuration import read_config
from jobs.runtime.plugs import read_plug
from persona.errors import InputError, PlugMismatch
from persona.plug import record as plug_record
from persona.storage import join, write_bytes
from persona.store import registry
from persona.store.store import Store
from tests.jobs.conftest import Done, Job, arguments, new_plug
from tests.pages import ROOT
from tests.persona.evaluation.test_many_runs import files

N_USERS = 30


@pytest.fixture(scope="module")
def folders(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three plugs for the same models."""
    root = tmp_path_factory.mktemp("plugs")
    return [new_plug(root / f"v{n}", models["encoder"], models["llama"], seed=n) for n in range(3)]


def evaluated(root: Path, plug: str, own: float, *, other: float = 3.0, first_user: int = 0, **more: Any) -> str:
    """The files of `evaluate`: a request of a user each, with these nats a token."""
    folder = join(str(root), f"evaluation-{Path(plug).name}-{own}")
    users = {f"r{n}": f"user-{n}" for n in range(first_user, first_user + N_USERS)}
    nats = {kind: [loss + 0.01 * (n % 7) for n in range(N_USERS)] for kind, loss in (("own", own), ("other", other))}
    settings = {"plug_fingerprint": plug_record.fingerprint(Path(plug)), **more}
    found = files(nats, tokens=dict.fromkeys(users, 1), users=users, settings=settings)
    for name, data in zip(("metrics.json", "losses.parquet"), found, strict=True):
        write_bytes(join(folder, name), data)
    return folder


@pytest.fixture
def promote(refuse: Job, store: Path, tmp_path: Path) -> Any:
    """Evaluates a plug with these nats a token, and runs `plugs promote`."""

    def call(plug: str, own: float, *, allow_rolled_back: bool | None = None, **evaluation: Any) -> Done:
        found = evaluated(tmp_path, plug, own, **evaluation)
        flags = {"plug": plug, "evaluation": found, "allow_rolled_back": allow_rolled_back}
        return refuse(plugs, action="promote", store=str(store), **flags)

    return call


def live(store: Path) -> str:
    return registry.read(Store.open(str(store))).require_live().uri


def test_a_better_plug_goes_live_a_worse_one_is_refused_and_one_can_go_back(
    refuse: Job, promote: Any, store: Path, folders: list[str]
) -> None:
    first, better, worse = folders
    done = promote(first, 2.5)
    assert (done.code, done.result["promoted"], live(store)) == (0, True, first)
    again = promote(first, 2.5)
    assert (again.code, again.result["promoted"]) == (0, False)
    assert "as before" in again.table

    refused = promote(worse, 2.6)
    assert (refused.code, refused.result["promoted"], live(store)) == (4, False, first)
    assert "not promoted" in refused.said and "against the live plug" in refused.said
    assert [check["holds"] for check in refused.result["checks"]] == [True, False]
    assert "version 1" in refused.table

    assert (promote(better, 2.0).code, live(store)) == (0, better)
    back = refuse(plugs, action="rollback", store=str(store))
    assert (back.code, back.result["live"]["uri"], live(store)) == (0, first, first)

    # The schedule of the next night must not undo that.
    stopped = promote(better, 2.0)
    assert (stopped.code, live(store)) == (4, first)
    assert "was rolled back on" in stopped.said
    assert (promote(better, 2.0, allow_rolled_back=True).code, live(store)) == (0, better)

    listed = refuse(plugs, action="list", store=str(store))
    assert [(one["version"], one["stage"]) for one in listed.result["plugs"]] == [
        (1, "retired"),
        (2, "refused"),
        (3, "live"),
    ]
    assert listed.table.splitlines()[1].split()[:3] == ["version", "stage", "loss"]


def test_a_plug_whose_own_persona_gains_nothing_is_refused(promote: Any, store: Path, folders: list[str]) -> None:
    done = promote(folders[0], 3.0)
    assert done.code == 4 and "against another user's persona" in done.said
    with pytest.raises(InputError, match="no live plug yet"):
        live(store)


def test_live_stands_for_the_plug_that_was_promoted(promote: Any, store: Path, models: Any, tmp_path: Path) -> None:
    opened = Store.open(str(store))
    folder = new_plug(tmp_path / "mine", models["encoder"], models["llama"])
    assert promote(folder, 2.5).code == 0
    assert read_plug("live", store=opened) == read_plug(folder)
    new_plug(tmp_path / "mine", models["encoder"], models["llama"], seed=1)
    with pytest.raises(PlugMismatch, match="version 1 was promoted as"):
        read_plug("live", store=opened)


def test_an_evaluation_must_be_of_the_plug_and_comparable(
    refuse: Job, promote: Any, store: Path, tmp_path: Path, folders: list[str]
) -> None:
    first, second, _ = folders
    assert promote(first, 2.5).code == 0
    flags: dict[str, Any] = {"action": "promote", "store": str(store), "plug": second}
    other = refuse(plugs, **flags, evaluation=evaluated(tmp_path, first, 2.5))
    assert other.code == 2 and "is of the plug" in other.said
    nothing = refuse(plugs, **flags, evaluation=str(tmp_path))
    assert nothing.code == 2 and "has no metrics.json and losses.parquet" in nothing.said
    apart = evaluated(tmp_path, second, 2.0, first_user=100)
    unlike = refuse(plugs, **flags, evaluation=apart)
    assert unlike.code == 2 and "share no request" in unlike.said and "--live-evaluation" in unlike.said
    same_users = evaluated(tmp_path, first, 2.4, first_user=100)
    dry = refuse(plugs, **flags, evaluation=apart, live_evaluation=same_users, dry_run=True)
    assert (dry.code, dry.result["promoted"], live(store)) == (0, True, first)
    assert refuse(plugs, **flags, evaluation=apart, allow_incomparable=True).code == 0
    assert live(store) == second


def test_a_new_evaluation_is_shown_beside_those_of_the_other_plugs(
    promote: Any, store: Path, tmp_path: Path, folders: list[str]
) -> None:
    first, second, third = folders
    assert promote(first, 2.5).code == 0
    assert promote(second, 2.6).code == 4
    found = Path(evaluated(tmp_path, third, 2.0))
    metrics, losses = json.loads((found / "metrics.json").read_text()), (found / "losses.parquet").read_bytes()
    opened, plug = Store.open(str(store)), read_plug(third)
    compared = plug_versions.compared(opened, plug, metrics, losses, seed=0)
    assert compared is not None
    assert [(row["version"], row["stage"]) for row in compared["rows"]] == [
        (1, "live"),
        (2, "refused"),
        (None, "this one"),
    ]
    assert [row["saved_by_newest"]["mean"] for row in compared["rows"][:2]] == pytest.approx([0.5, 0.6])
    for name in ("metrics.json", "losses.parquet"):
        for version in registry.read(opened).versions:
            Path(version.evaluation, name).unlink()
    assert plug_versions.compared(opened, plug, metrics, losses, seed=0) is None


def test_flags_go_with_their_action(refuse: Job, store: Path) -> None:
    flags: dict[str, Any] = {"store": str(store)}
    done = refuse(plugs, action="rollback", plug="p", **flags)
    assert done.code == 2 and "--plug goes with promote, not with rollback" in done.said
    done = refuse(plugs, action="promote", plug="p", **flags)
    assert done.code == 2 and "promote needs --plug" in done.said
    done = refuse(plugs, action="rollback", **flags)
    assert done.code == 2 and "no live plug yet" in done.said


def test_forget_finds_the_evaluations_that_plugs_were_promoted_with(
    promote: Any, store: Path, tmp_path: Path, folders: list[str]
) -> None:
    assert promote(folders[0], 2.5).code == 0
    opened = Store.open(str(store))
    (found,) = [one.evaluation for one in registry.read(opened).versions]
    config = read_config(forget.Config, arguments(store=str(store), user="user-1"))
    assert config is not None
    assert forget.report_folders(config, [opened]) == [found]
    for name in ("metrics.json", "losses.parquet"):
        Path(found, name).unlink()
    assert forget.report_folders(config, [opened]) == []


def test_it_needs_neither_ray_nor_torch(store: Path, tmp_path: Path, folders: list[str]) -> None:
    found = evaluated(tmp_path, folders[0], 2.5)
    flags = arguments(action="promote", store=str(store), plug=folders[0], evaluation=found)
    code = (
        "import sys\nfrom jobs import plugs\nfrom jobs.runtime import cli\n"
        f"assert cli.run(plugs.Config, plugs.main, {flags}) == 0\n"
        "print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
