"""Plugs as folders: a loaded plug answers as the saved one, and mismatches are refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persona import storage
from persona.engines.local import LocalEngine
from persona.errors import InputError, PlugMismatch, UsageError
from persona.models.encoder_settings import settle
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.options import Decoding, PromptOptions
from persona.plug import folder as plug_folder, record as plug_record
from persona.plug.user_personas import UserPersonas
from tests.encoders import sentence_transformer
from tests.models import tiny_encoder
from tests.plugs import ROWS, losses, new_answerer, new_model, record_of, save

VARIANTS = [
    {},
    {"recency": True},
    {"weights": "mean"},
    {"weights": "mean", "recency": True},
    {"persona_gain": 4.0},
    {"learn_temperature": True, "instruction": "projected"},
    {"instruction": "none"},
    {"query_token": True},
    {"weights": "mean", "query_token": True},
]
GREEDY = Decoding(max_new_tokens=6, beams=1)


@pytest.fixture
def saved(encoder_folder, llm_folder, llm, tmp_path) -> Path:
    """A plug whose weights differ from those of a new one."""
    model = new_model(encoder_folder, llm, prompt="Represent: ", learn_temperature=True)
    with torch.no_grad():
        for parameter in model.plug.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return save(tmp_path / "plug", model, encoder_folder, llm_folder)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_saved_plug_answers_as_before(options, encoder_folder, llm_folder, llm, tmp_path):
    model = new_model(encoder_folder, llm, prompt="Represent: ", **options)
    save(tmp_path / "plug", model, encoder_folder, llm_folder)
    torch.manual_seed(99)  # a new plug would have other weights
    again = plug_folder.load(tmp_path / "plug", encoder=encoder_folder, llm=llm)
    assert torch.equal(losses(again, ROWS), losses(model, ROWS))
    engine = LocalEngine(llm, batch_size=32)
    answerer = plug_folder.load_answerer(tmp_path / "plug", encoder=encoder_folder, engine=engine, batch_size=32)
    assert answerer.answer(ROWS, GREEDY) == new_answerer(model).answer(ROWS, GREEDY)
    assert not again.plug.training


def test_the_query_encoder_runs_in_the_precision_of_the_llm_with_the_same_vectors(saved, encoder_folder, llm_folder):
    vectors_Bd = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        llm = FrozenLLM.load(llm_folder, precision=precision)
        model = plug_folder.load(saved, encoder=encoder_folder, llm=llm)
        assert model.plug.query_encoder.dtype is dtype
        assert model.plug.projector.outer.weight.dtype is torch.float32
        with torch.inference_mode():
            vectors_Bd[precision] = model.plug.encode_query(*model.collate(ROWS).query)
    assert vectors_Bd["bf16"].dtype is torch.float32
    assert torch.cosine_similarity(vectors_Bd["fp32"], vectors_Bd["bf16"]).min() > 0.999


def test_the_record_is_read_as_it_was_saved(saved, encoder_folder, llm_folder, llm):
    model = plug_folder.load(saved, encoder=encoder_folder, llm=llm)
    record = plug_record.with_digest(record_of(model, encoder_folder, llm_folder), saved)
    assert plug_record.read(saved) == record


def test_a_plug_from_before_query_tokens_keeps_its_fingerprint(saved):
    fields = json.loads((saved / "plug.json").read_text())
    found = plug_record.fingerprint(saved)
    assert fields["options"].pop("query_token") is False
    (saved / "plug.json").write_text(json.dumps(fields))
    assert plug_record.fingerprint(saved) == found
    # What the fingerprint was before there were query tokens.
    facts = {name: value for name, value in fields.items() if name not in ("format", "training", "weights_digest")}
    digest = hashlib.blake2b((saved / "plug.safetensors").read_bytes(), digest_size=16)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    assert digest.hexdigest() == found
    fields["options"]["query_token"] = True
    (saved / "plug.json").write_text(json.dumps(fields))
    assert plug_record.fingerprint(saved) != found


def test_a_record_without_an_option_is_refused_as_its_default_may_have_changed(saved):
    fields = json.loads((saved / "plug.json").read_text())
    del fields["options"]["persona_gain"]
    (saved / "plug.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="options lacks persona_gain"):
        plug_record.read(saved)


def test_how_prompts_are_written_is_part_of_the_record_and_the_fingerprint(saved):
    record = plug_record.read(saved)
    before = plug_record.fingerprint(saved)
    prompt = PromptOptions(prompt_format="chat", system="Write.", template_argument=("thinking=false",))
    (saved / "plug.json").write_text(replace(record, prompt=prompt).to_json())
    assert plug_record.read(saved).prompt == prompt
    assert plug_record.fingerprint(saved) != before


def test_the_folder_holds_only_weights_of_the_plug(saved, encoder_folder, llm):
    assert sorted(file.name for file in saved.iterdir()) == ["README.md", "plug.json", "plug.safetensors"]
    weights = load_file(saved / "plug.safetensors")
    assert set(weights) == set(new_model(encoder_folder, llm, learn_temperature=True).plug.state_dict())
    assert {name.split(".")[0] for name in weights} == {
        "query_encoder", "projector", "typical_behavior", "full_strength", "instruction", "log_temperature",
    }  # fmt: skip


def test_the_query_encoder_starts_as_the_frozen_encoder_without_pooler_and_dropout(encoder_folder, llm):
    weights = load_file(encoder_folder.path / "model.safetensors")
    encoder = new_model(encoder_folder, llm).plug.query_encoder
    mine = encoder.state_dict()
    assert set(weights) - set(mine) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(mine[name], weights[name]) for name in mine)
    assert all(part.p == 0 for part in encoder.modules() if isinstance(part, torch.nn.Dropout))


def test_the_card_names_models_losses_and_settings(saved, encoder_folder, llm_folder):
    card = (saved / "README.md").read_text()
    for expected in (llm_folder.fingerprint, encoder_folder.fingerprint, "| 1,200 | 3.5000 |", "| seed | 3 |"):
        assert expected in card


def test_the_fingerprint_changes_with_whatever_answers_depend_on(saved, tmp_path):
    found = plug_record.fingerprint(saved)
    moved = Path(shutil.copytree(saved, tmp_path / "moved"))
    assert plug_record.fingerprint(moved) == found
    record = plug_record.read(moved)
    (moved / "plug.json").write_text(replace(record, training={"another": "run"}).to_json())
    assert plug_record.fingerprint(moved) == found
    (moved / "plug.json").write_text(replace(record, query_prompt="").to_json())
    assert plug_record.fingerprint(moved) != found
    shutil.copy(saved / "plug.json", moved)
    weights = bytearray((moved / "plug.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "plug.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"belong to different plugs.*interrupted"):
        plug_record.fingerprint(moved)
    (moved / "plug.json").write_text(plug_record.with_digest(record, moved).to_json())
    assert plug_record.fingerprint(moved) != found
    # A plug from before records had a digest.
    (moved / "plug.json").write_text(replace(record, weights_digest="").to_json())
    shutil.copy(saved / "plug.safetensors", moved)
    assert plug_record.fingerprint(moved) == found


@pytest.mark.parametrize("name", ["plug.json", "plug.safetensors"])
def test_an_incomplete_folder_is_refused(saved, encoder_folder, llm, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=r"no complete plug here .*train one with jobs\.train"):
        plug_folder.load(saved, encoder=encoder_folder, llm=llm)


def test_a_folder_that_is_overwritten_is_incomplete_until_the_end(saved, encoder_folder, llm_folder, llm):
    model = plug_folder.load(saved, encoder=encoder_folder, llm=llm)
    with pytest.raises(TypeError):
        plug_folder.save(saved, model.plug.state_dict(), record_of(model, encoder_folder, llm_folder), card=None)
    with pytest.raises(InputError, match="no complete plug here"):
        plug_record.read(saved)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not JSON", "Expecting value"),
        ("[]", "not a valid plug.json"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ('{"a":' * 100_000, "maximum recursion depth exceeded"),
        ("\udcff", "not a valid plug.json .*can't decode byte"),
        ("", "Expecting value"),
        ('{"format": 1}', "format 1, this version reads format 3; train a new plug"),
        ('{"format": 3, "options": {}}', "options lacks instruction"),
    ],
)
def test_an_invalid_record_is_refused(saved, text, reason):
    (saved / "plug.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=reason):
        plug_record.read(saved)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"encoder_width": "32"}, "encoder_width must be int, not '32'"),
        ({"encoder_width": 0}, "encoder_width must be 1 or more"),
        ({"pooling": "sum"}, "pooling 'sum': must be cls, mean, "),
        ({"token_norm": float("nan")}, "token_norm must be float, not 'nan'"),
        ({"encoder": {"name": "e"}}, "encoder lacks fingerprint, revision"),
        ({"encoder": {"name": 3}}, "encoder must be dict"),
        ({"training": []}, "training must be dict"),
        ({"unheard_of": 1}, "unexpected keyword argument 'unheard_of'"),
        ({"options": {"persona_tokens": 2.5}}, "persona_tokens must be int, not '2.5'"),
        ({"options": {"weights": "median"}}, "weights must be 'attention' or 'mean', not 'median'"),
        ({"options": {"persona_tokens": "2"}}, "not a valid plug.json"),
        ({"options": None}, "not a valid plug.json"),
    ],
)
def test_a_record_that_no_training_run_writes_is_refused(saved, values, reason):
    fields = json.loads((saved / "plug.json").read_text())
    if isinstance(values.get("options"), dict):
        values = {"options": {**fields["options"], **values["options"]}}
    (saved / "plug.json").write_text(json.dumps({**fields, **values}))
    with pytest.raises(InputError, match=reason):
        plug_record.read(saved)


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("unknown_option", 1)])
def test_invalid_options_are_refused(saved, name, value):
    fields = json.loads((saved / "plug.json").read_text())
    fields["options"][name] = value
    (saved / "plug.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"not a valid plug\.json"):
        plug_record.read(saved)


def test_another_encoder_or_llm_is_refused(saved, encoder_folder, llm_folder, tmp_path):
    record = plug_record.read(saved)
    plug_record.check_models(record, encoder=encoder_folder, llm=llm_folder)
    other = resolve(str(tiny_encoder(tmp_path / "other", seed=1)), flag="--encoder")
    with pytest.raises(
        PlugMismatch, match=f"trained for the encoder .*{record.encoder['fingerprint'][:12]}.*{other.name}"
    ):
        plug_record.check_models(record, encoder=other, llm=llm_folder)
    with pytest.raises(PlugMismatch, match=r"trained for the LLM .* or train a new plug"):
        plug_record.check_models(record, encoder=encoder_folder, llm=other)


def test_an_llm_of_another_width_is_refused(saved, encoder_folder, llm):
    record = plug_record.read(saved)
    (saved / "plug.json").write_text(replace(record, llm_width=4096).to_json())
    with pytest.raises(PlugMismatch, match="soft tokens of width 4096, the LLM's tokens have width 48"):
        plug_folder.load(saved, encoder=encoder_folder, llm=llm)


def test_weights_that_do_not_fit_the_record_are_refused(saved, encoder_folder, llm):
    record = plug_record.read(saved)
    (saved / "plug.json").write_text(replace(record, options=replace(record.options, persona_tokens=3)).to_json())
    with pytest.raises(PlugMismatch, match=r"plug\.safetensors does not fit plug\.json and the encoder"):
        plug_folder.load(saved, encoder=encoder_folder, llm=llm)


def test_a_truncated_weights_file_is_refused(saved, encoder_folder, llm):
    weights = (saved / "plug.safetensors").read_bytes()
    (saved / "plug.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"plug\.safetensors is not a whole safetensors file .*copy the file again"):
        plug_folder.load(saved, encoder=encoder_folder, llm=llm)


@pytest.mark.parametrize(
    "data", [b"", (2**60).to_bytes(8, "little") + b"{}", (500_000).to_bytes(8, "little") + b'{"a":' * 100_000]
)
def test_broken_weights_are_refused(saved, data):
    (saved / "plug.safetensors").write_bytes(data)
    for read in (plug_record.read, plug_record.fingerprint, UserPersonas.load):
        with pytest.raises(InputError, match=r"/plug: plug\.safetensors is not a whole safetensors file"):
            read(saved)


@pytest.mark.parametrize("name", ["plug.json", "plug.safetensors"])
def test_a_file_that_cannot_be_read_is_refused(saved, name):
    (saved / name).unlink()
    (saved / name).symlink_to("/proc/self/mem")  # reading it fails for root, too
    with pytest.raises(InputError, match="/plug: .*(Input/output error|not a whole safetensors file)"):
        plug_record.read(saved)


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b", "a+b", "é"])
def test_a_plug_in_a_folder_of_any_name(saved, tmp_path, name):
    storage.copy_folder(str(saved), str(tmp_path / name))
    with plug_record.local_plug(str(tmp_path / name), plug_record.fingerprint(saved)) as folder:
        assert folder == tmp_path / name


def test_a_pickle_is_never_read(saved, encoder_folder, llm):
    torch.save({}, saved / "plug.pt")
    (saved / "plug.safetensors").unlink()
    with pytest.raises(InputError, match="no complete plug here"):
        plug_folder.load(saved, encoder=encoder_folder, llm=llm)


def test_a_plug_whose_encoder_has_dense_layers_is_saved_with_them_and_loads_anywhere(tmp_path, llm, llm_folder):
    path = sentence_transformer(tmp_path / "encoder", kind="t5", dense=[(24, torch.nn.Tanh())])
    encoder = resolve(str(path), flag="--encoder")
    settings = settle(encoder)
    model = new_model(encoder, llm, pooling=settings.pooling, width=settings.width)
    with torch.no_grad():  # as after some training
        for parameter in (*model.plug.query_encoder.parameters(), *model.plug.query_head.parameters()):
            parameter.add_(0.01)
    record = replace(record_of(model, encoder, llm_folder), pooling=settings.pooling, encoder_width=settings.width)
    plug_folder.save(tmp_path / "plug", model.plug.state_dict(), record, plug_record.card(record, example="<s>[input]"))

    loaded = plug_folder.load_plug(tmp_path / "plug", encoder=encoder)
    query = model.query_text.tokens(["a walk by the river", "it"], torch.device("cpu"))
    torch.testing.assert_close(loaded.encode_query(*query), model.plug.encode_query(*query), rtol=1e-6, atol=1e-6)
    assert "query_head.layers.0.linear.weight" in loaded.state_dict()
    assert UserPersonas.load(tmp_path / "plug").plug.query_head is None


def test_queries_longer_than_the_encoders_positions_are_refused(encoder_folder):
    with pytest.raises(UsageError, match="at most 512 tokens of a text, not 600"):
        plug_folder.new_query_text(encoder_folder, "", 600)


def test_two_copies_of_an_llm_take_the_same_plug(saved, encoder_folder, llm_folder):
    first, second = (FrozenLLM.load(llm_folder, precision="fp32", device="cpu") for _ in range(2))
    a, b = (plug_folder.load(saved, encoder=encoder_folder, llm=one) for one in (first, second))
    assert torch.equal(losses(a, ROWS), losses(b, ROWS))
