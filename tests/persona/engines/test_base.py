"""The engine interface: an engine that is found by name answers tables of requests, without a FrozenLLM."""

import sys
from collections.abc import Sequence
from types import ModuleType

import pyarrow as pa
import pytest
import torch

from persona.engines.base import Answer, Engine, EngineSettings, Prompt, engine_module
from persona.errors import PlugMismatch, UsageError
from persona.models.prompts import PromptText, PromptTokenizer
from persona.models.resolve import ModelFolder
from persona.options import Decoding, PromptOptions
from persona.plug import folder as plug_folder
from persona.plug.request_tables import answer_all
from tests.plugs import ROWS, new_model, save

SETTINGS = EngineSettings(max_input_tokens=32, prompt=PromptOptions(), precision="fp32", batch_size=2)
SAMPLE = Decoding(max_new_tokens=5, beams=1, sample=True)
PERSONAS = ["own", "bare", "none", "mean", "bare", "other"]


class EchoEngine:
    """Answers with the prompt's text, from the folder's tokenizer and configuration alone."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, folder: ModelFolder, max_input_tokens: int, prompt: PromptOptions) -> None:
        config = folder.config
        self.tokenizer = PromptTokenizer.load(folder, max_input_tokens=max_input_tokens, prompt=prompt)
        self.width: int = config.get("hidden_size") or config["d_model"]
        self.calls: list[tuple[list[Prompt], list[int]]] = []

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        self.calls.append((list(prompts), list(seeds)))
        return [self._echo(prompt, decoding) for prompt in prompts]

    def _echo(self, prompt: Prompt, decoding: Decoding) -> Answer:
        text = self.tokenizer.decode([*prompt.ids.before, *prompt.ids.after])
        return Answer(text=f"{len(prompt.soft_SD)}: {text}", n_tokens=decoding.max_new_tokens, finish_reason="length")


def load(folder: ModelFolder, settings: EngineSettings) -> EchoEngine:
    assert (settings.precision, settings.batch_size) == ("fp32", 2)
    return EchoEngine(folder, settings.max_input_tokens, settings.prompt)


@pytest.fixture
def engine(llm_folder, monkeypatch) -> Engine:
    """The echo engine, registered and found by its name."""
    module = ModuleType("persona.engines.echo")
    module.load = load
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return engine_module("echo").load(llm_folder, SETTINGS)


@pytest.fixture
def requests() -> pa.Table:
    texts = [["it is"], [], ["a title", "the movie"], [], ["of it"], []]
    rows = [
        {**row, "persona": persona, "retrieved": retrieved}
        for row, persona, retrieved in zip(ROWS, PERSONAS, texts, strict=True)
    ]
    return pa.Table.from_pylist(rows)


def test_an_engine_found_by_name_answers_tables_of_requests_in_order(
    engine, requests, encoder_folder, llm_folder, llm, tmp_path
):
    model = new_model(encoder_folder, llm)
    folder = save(tmp_path / "plug", model, encoder_folder, llm_folder)
    answerer = plug_folder.load_answerer(
        folder, encoder=encoder_folder, engine=engine, batch_size=2, retrieved_tokens=12
    )
    answers = answer_all(answerer, requests, SAMPLE)

    rows = requests.to_pylist()
    n_soft = [0 if row["persona"] == "bare" else 3 for row in rows]
    for row, n, output in zip(rows, n_soft, answers["output"].to_pylist(), strict=True):
        text = PromptText(input=row["input"], retrieved=row["retrieved"])
        [ids] = engine.tokenizer.prompts([text], retrieved_tokens=12)
        assert output == f"{n}: {engine.tokenizer.decode([*ids.before, *ids.after])}"
    assert answers["n_tokens"].to_pylist() == [5] * len(rows)
    assert answers["finish_reason"].to_pylist() == ["length"] * len(rows)


def test_an_engine_gets_all_requests_of_a_kind_at_once_with_their_soft_tokens_and_seeds(
    engine, requests, encoder_folder, llm_folder, llm, tmp_path
):
    folder = save(tmp_path / "plug", new_model(encoder_folder, llm), encoder_folder, llm_folder)
    answerer = plug_folder.load_answerer(folder, encoder=encoder_folder, engine=engine, batch_size=1)
    answer_all(answerer, requests, SAMPLE)
    # `own`, `none` and `other` together, then `bare`, then `mean`, as they come; longest input first.
    assert [len(prompts) for prompts, _ in engine.calls] == [3, 2, 1]
    rows = sorted((ROWS[i] for i in (0, 2, 5)), key=lambda row: -len(row["input"] + row["target"]))
    prompts, seeds = engine.calls[0]
    assert seeds == [SAMPLE.row_seed(row["request_id"]) for row in rows]
    model = plug_folder.load(folder, encoder=encoder_folder, llm=llm)
    for row, prompt in zip(rows, prompts, strict=True):
        torch.testing.assert_close(prompt.soft_SD, model.soft_tokens(model.collate([row]))[0])


def test_a_plug_of_another_width_is_refused(engine, encoder_folder, llm_folder, llm, tmp_path):
    folder = save(tmp_path / "plug", new_model(encoder_folder, llm), encoder_folder, llm_folder)
    engine.width = 64
    with pytest.raises(PlugMismatch, match="width 48, the LLM's tokens have width 64"):
        plug_folder.load_answerer(folder, encoder=encoder_folder, engine=engine, batch_size=2)


@pytest.mark.parametrize("name", ["unheard_of", "base", "decoding", "a.b"])
def test_a_name_that_is_no_engine_is_refused(name):
    with pytest.raises(UsageError, match=f"unknown name '{name}': persona.engines has no module of this name"):
        engine_module(name)
