"""The Python API: the blocks of docs/python.md run, and results equal those of the modules behind the API."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import persona
from persona.errors import InputError, PlugMismatch, UsageError
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder, resolve
from persona.options import PersonaKind
from persona.plug import folder as plug_folder
from persona.store.identity import Identity
from persona.store.store import Store
from persona.store.vectors import to_column
from tests.models import ENCODER_WIDTH, LLM_WIDTH, tiny_chat_llama, tiny_encoder
from tests.plugs import losses, new_answerer, new_model, save
from tests.stores import behaviors, write_rows

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
USERS = {"ada": 4, "bruno": 3, "chloe": 1}
MAX_BEHAVIORS = 3
START = datetime(2026, 1, 1, tzinfo=UTC)
SHORT = persona.Decoding(beams=1, max_new_tokens=4)


def rows() -> list[dict[str, Any]]:
    return [
        {
            "user_id": user,
            "behavior_id": f"{user}-{i}",
            "text": f"{user} likes paper {i}",
            "timestamp": START + timedelta(days=i),
        }
        for user, n in USERS.items()
        for i in range(n)
    ]


def text_encoder(folder: ModelFolder) -> TextEncoder:
    return TextEncoder(folder, pooling="cls", max_tokens=128, device="cpu")


@pytest.fixture(scope="module")
def store_uri(encoder_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the vectors of `rows`."""
    identity = Identity(
        encoder=encoder_folder.name,
        revision=encoder_folder.revision,
        fingerprint=encoder_folder.fingerprint,
        width=ENCODER_WIDTH,
        pooling="cls",
        max_tokens=128,
        text_rule="text as given, cut to max_tokens",
    )
    uri = str(tmp_path_factory.mktemp("api") / "store")
    store = Store.create(uri, identity, 4)
    table = behaviors(*((row["user_id"], row["behavior_id"], row["text"], row["timestamp"]) for row in rows()))
    vectors = text_encoder(encoder_folder).encode(table["text"].to_pylist()).vectors
    table = table.append_column("vector", to_column(vectors))
    write_rows(store, "behaviors", table.append_column("change", pa.repeat("new", table.num_rows)))
    return uri


@pytest.fixture(scope="module")
def plug_uri(encoder_folder: ModelFolder, llama_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plug with random weights for the tiny Llama."""
    llm = FrozenLLM.load(llama_folder, precision="fp32", device="cpu")
    folder = save(tmp_path_factory.mktemp("api") / "plug", new_model(encoder_folder, llm), encoder_folder, llama_folder)
    record = json.loads((folder / "plug.json").read_text()) | {"max_behaviors": MAX_BEHAVIORS, "query_prompt": ""}
    (folder / "plug.json").write_text(json.dumps(record))
    return str(folder)


@pytest.fixture(scope="module")
def plug(store_uri: str, plug_uri: str) -> persona.LoadedPlug:
    return persona.load_plug(plug_uri, store=persona.open_store(store_uri), precision="fp32", device="cpu")


def test_the_blocks_of_the_documentation_run(store_uri: str, plug_uri: str):
    names: dict[str, Any] = {"STORE": store_uri, "PLUG": plug_uri, "USER": "ada"}
    assert len(BLOCKS) == DOCS.count("```python") >= 5
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["history"].vectors.shape == (USERS["ada"], ENCODER_WIDTH)
    assert (len(names["past"]), len(names["latest"])) == (2, 2)
    assert set(names["losses"]) == {"own", "none", "other", "mean", "bare"}
    assert len(set(names["losses"].values())) == 5
    assert names["losses"]["own"] == names["loss"].per_token
    assert names["answer"].n_tokens <= 8
    assert len(names["writer"].vectors) == 2


def test_importing_persona_loads_nothing_heavy():
    code = "import persona, sys; persona.__version__; dir(persona); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert not {"numpy", "pyarrow", "torch", "transformers", "deltalake", "boto3"} & set(done.stdout.split())


def test_every_public_name_can_be_imported():
    for name in persona.__all__:
        assert getattr(persona, name) is not None
        assert name in dir(persona)
    with pytest.raises(AttributeError, match="has no attribute 'close_store'"):
        persona.close_store  # noqa: B018


def test_a_history_is_read_in_order_with_the_vectors_of_its_texts(store_uri: str, encoder_folder: ModelFolder):
    history = persona.read_history(persona.open_store(store_uri), "ada")
    mine = [row for row in rows() if row["user_id"] == "ada"]
    assert history.table["behavior_id"].to_pylist() == [row["behavior_id"] for row in mine]
    assert history.table["timestamp"].to_pylist() == [row["timestamp"] for row in mine]
    expected = text_encoder(encoder_folder).encode([row["text"] for row in mine]).vectors
    # Another batch may round float32 sums differently: half a unit of float16, 2^-12 of the largest value.
    np.testing.assert_allclose(history.vectors, expected, rtol=0, atol=2**-11)


def test_an_unknown_user_has_an_empty_history(store_uri: str, plug: persona.LoadedPlug):
    assert persona.read_history(persona.open_store(store_uri), "nobody").vectors.shape == (0, ENCODER_WIDTH)
    found, without = plug.persona("nobody"), plug.persona("ada", kind="none")
    np.testing.assert_array_equal(found.soft_tokens("a request"), without.soft_tokens("a request"))


@pytest.mark.parametrize("kind", PersonaKind)
def test_a_persona_equals_the_model_behind_it(
    plug: persona.LoadedPlug,
    store_uri: str,
    plug_uri: str,
    encoder_folder: ModelFolder,
    llama_folder: ModelFolder,
    kind: PersonaKind,
):
    user = {PersonaKind.OTHER: "bruno"}.get(kind, "ada")  # the next user by id
    history = persona.read_history(persona.open_store(store_uri), user, max_behaviors=MAX_BEHAVIORS).vectors.tobytes()
    row = {"request_id": "", "input": "a title", "query": "a paper", "target": "good"}
    row["history"] = b"" if kind.sees_no_history else history
    llm = FrozenLLM.load(llama_folder, precision="fp32", device="cpu")
    model = plug_folder.load(Path(plug_uri), encoder=encoder_folder, llm=llm)
    batch = model.collate([row], persona=kind)
    found = plug.persona("ada", kind=kind.value)
    assert found.vectors.tobytes() == row["history"]
    with torch.inference_mode():
        loss = found.loss("a title", "good", query="a paper")
        assert (loss.nats, loss.tokens) == (float(model(batch)), batch.n_target_tokens)
        soft_SD = model.soft_tokens(batch)[0].numpy()
    np.testing.assert_array_equal(found.soft_tokens("a title", query="a paper"), soft_SD)
    assert soft_SD.shape == (0 if kind is PersonaKind.BARE else plug.record.options.n_soft, LLM_WIDTH)
    assert (
        found.answer("a title", query="a paper", decoding=SHORT)
        == new_answerer(model).answer([row], SHORT, persona=kind)[0]
    )


def test_as_of_hides_behaviors_that_are_not_older(plug: persona.LoadedPlug):
    assert len(plug.persona("ada", as_of=START + timedelta(days=2)).vectors) == 2
    assert len(plug.persona("ada", as_of=START).vectors) == 0


def test_a_persona_from_texts_equals_that_of_the_same_texts_in_the_store(plug: persona.LoadedPlug):
    texts = [row["text"] for row in rows() if row["user_id"] == "ada"]
    from_texts, stored = plug.persona_from_texts(texts), plug.persona("ada")
    assert len(from_texts.vectors) == MAX_BEHAVIORS
    np.testing.assert_allclose(from_texts.vectors, stored.vectors, rtol=0, atol=2**-11)
    assert plug.persona_from_texts([]).vectors.shape == (0, ENCODER_WIDTH)


def test_wrong_use_is_refused(store_uri: str, plug_uri: str, plug: persona.LoadedPlug, tmp_path: Path):
    with pytest.raises(InputError, match="there is no store at"):
        persona.open_store(tmp_path)
    with pytest.raises(InputError, match="no complete plug here"):
        persona.load_plug(tmp_path)
    with pytest.raises(UsageError, match="must be own, none, other, mean, bare"):
        plug.persona("ada", kind="mine")
    with pytest.raises(UsageError, match="loaded without a store"):
        persona.load_plug(plug_uri, precision="fp32").persona("ada")
    with pytest.raises(UsageError, match="the other user's texts"):
        plug.persona_from_texts(["a text"], kind="other")
    with pytest.raises(UsageError, match="--beams 0"):
        plug.persona("ada").answer("a title", decoding=persona.Decoding(beams=0))


def test_another_store_or_encoder_is_refused(store_uri: str, plug_uri: str, tmp_path: Path):
    other = resolve(str(tiny_encoder(tmp_path / "encoder", seed=1)), flag="--encoder")
    with pytest.raises(PlugMismatch, match="trained for the encoder"):
        persona.load_plug(plug_uri, encoder=str(other.path))
    identity = Identity(**{**vars(persona.open_store(store_uri).identity), "fingerprint": other.fingerprint})
    with pytest.raises(PlugMismatch, match="give the store that it was trained on"):
        persona.load_plug(plug_uri, store=Store.create(str(tmp_path / "store"), identity, 4))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"pooling": "mean"}, "pooling 'cls' instead of 'mean'"),
        ({"document_prompt": "passage: "}, "document prompt '' instead of 'passage: '"),
    ],
)
def test_a_store_of_other_vectors_of_the_same_encoder_is_refused(
    store_uri: str, plug_uri: str, tmp_path: Path, changed: dict[str, str], says: str
):
    identity = Identity(**{**vars(persona.open_store(store_uri).identity), **changed})
    with pytest.raises(PlugMismatch, match=says):
        persona.load_plug(plug_uri, store=Store.create(str(tmp_path / "store"), identity, 4))


def test_a_chat_may_have_a_system_text_of_its_own(encoder_folder: ModelFolder, tmp_path: Path) -> None:
    llm_folder = resolve(str(tiny_chat_llama(tmp_path / "llm")), flag="--llm")
    model = new_model(encoder_folder, FrozenLLM.load(llm_folder, precision="fp32", device="cpu"))
    folder = save(tmp_path / "plug", model, encoder_folder, llm_folder)
    own = persona.load_plug(folder, precision="fp32", device="cpu").persona_from_texts(["a paper"])
    row = {"input": "title", "query": "title", "target": "good", "history": own.vectors.tobytes()}
    for system in ("Write.", None):
        found = own.loss("title", "good", system=system)
        assert found.nats == pytest.approx(losses(model, [{**row, "system": system}]).item(), rel=1e-5)
    answers = [own.answer("title", system=system, decoding=SHORT).text for system in ("the movie " * 9, None)]
    assert answers[0] != answers[1]
