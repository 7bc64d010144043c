"""The local engine: answers equal those of transformers, in any batch, for T5-like and Llama-like LLMs."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from persona.engines import local
from persona.engines.base import Answer, EngineSettings, Prompt, engine_module
from persona.engines.local import LocalEngine
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds, PromptText
from persona.models.resolve import ModelFolder, resolve
from persona.options import Decoding, PromptOptions
from tests.plugs import random_soft_tokens

INPUTS = ["the movie is", "", "a paper with a title " * 12, "i like it", "rating\n{of} one"]
GREEDY, BEAMS = Decoding(max_new_tokens=10, beams=1), Decoding(max_new_tokens=10, beams=4)
SAMPLE = Decoding(max_new_tokens=10, beams=1, sample=True, sampling_temperature=0.8, top_p=0.9)


def numbered(n: int) -> list[str]:
    """Texts of three lengths."""
    return [f"{text} {number}" for number in range(n) for text in ("title", "it is", "for the paper")]


def prompts_of(
    llm: FrozenLLM, inputs: Sequence[str], seed: int = 0, retrieved: Sequence[Sequence[str]] = ()
) -> list[Prompt]:
    """Prompts with random soft tokens, and at most twelve tokens of retrieved texts."""
    parts = zip(inputs, retrieved or [[]] * len(inputs), strict=True)
    texts = [PromptText(input=text, retrieved=past) for text, past in parts]
    rows = zip(
        llm.tokenizer.prompts(texts, retrieved_tokens=12), random_soft_tokens(llm, len(inputs), seed), strict=True
    )
    return [Prompt(ids=ids, soft_SD=soft_SD) for ids, soft_SD in rows]


def embeds_of(llm: FrozenLLM, prompt: Prompt) -> torch.Tensor:
    """What the LLM reads (1, L, D)."""
    before, after = (torch.tensor(ids, dtype=torch.long) for ids in (prompt.ids.before, prompt.ids.after))
    return torch.cat([llm.embed(before), prompt.soft_SD, llm.embed(after)]).unsqueeze(0)


def answer(
    llm: FrozenLLM, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int] | None = None
) -> list[Answer]:
    """Answers in a single batch."""
    engine = LocalEngine(llm, batch_size=len(prompts))
    return engine.answer(prompts, decoding, [0] * len(prompts) if seeds is None else seeds)


def folder_with(folder: ModelFolder, target: Path, **generation_config) -> ModelFolder:
    """The LLM of a folder with other settings in its `generation_config.json`."""
    shutil.copytree(folder.path, target)
    file = target / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **generation_config}))
    return resolve(str(target), flag="--llm")


@pytest.fixture
def brief(llm_folder: ModelFolder, tmp_path: Path) -> FrozenLLM:
    """An LLM with short answers: like a chat model, it declares more end-of-sequence tokens, here thirty."""
    folder = folder_with(llm_folder, tmp_path / "brief", eos_token_id=list(range(1, 31)))
    return FrozenLLM.load(folder, precision="fp32", device="cpu")


@pytest.fixture
def generated(monkeypatch) -> list[list[int]]:
    """Fills with the tokens of every answer."""
    answers: list[list[int]] = []

    def recording(decode):
        def record(*args, **settings):
            found = decode(*args, **settings)
            answers.extend(found)
            return found

        return record

    for name in ("sample", "beam_search"):
        monkeypatch.setattr(local, name, recording(getattr(local, name)))
    return answers


# Batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, SAMPLE], ids=["greedy", "beams", "sample"])
def test_a_request_gets_the_same_answer_alone_and_in_any_batch(brief, decoding):
    prompts = prompts_of(brief, [*INPUTS, *numbered(3)])
    seeds = list(range(100, 100 + len(prompts)))
    together = answer(brief, prompts, decoding, seeds)
    for batch_size in (1, 4):
        assert LocalEngine(brief, batch_size=batch_size).answer(prompts, decoding, seeds) == together
    pairs = [answer(brief, [prompts[i], prompts[2]], decoding, [seeds[i], 0])[0] for i in range(5)]
    assert pairs == together[:5]
    assert len({answer.text for answer in together}) > 3
    # Some rows end while others continue; otherwise the test would prove nothing.
    assert {answer.finish_reason for answer in together} == {"stop", "length"}


def test_no_batch_is_larger_than_the_batch_size(llm):
    sizes: list[int] = []
    prompts = prompts_of(llm, numbered(2))
    llm.model.get_input_embeddings().register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    LocalEngine(llm, batch_size=4).answer(prompts, Decoding(max_new_tokens=1, beams=1), range(6))
    assert sizes == [4, 2]


def test_prompts_with_and_without_soft_tokens_keep_their_order(llm):
    with_soft = prompts_of(llm, numbered(2))
    bare = [Prompt(ids=prompt.ids, soft_SD=torch.empty(0, llm.width)) for prompt in with_soft]
    mixed = [*with_soft[:2], *bare[2:5], with_soft[5]]
    alone = [answer(llm, [prompt], GREEDY)[0] for prompt in mixed]
    assert LocalEngine(llm, batch_size=4).answer(mixed, GREEDY, [0] * 6) == alone
    assert alone != answer(llm, with_soft, GREEDY)


def test_no_prompts_get_no_answers(llm):
    assert LocalEngine(llm, batch_size=4).answer([], GREEDY, []) == []


def test_prompts_and_seeds_must_match(llm):
    with pytest.raises(ValueError, match="shorter"):
        LocalEngine(llm, batch_size=4).answer(prompts_of(llm, INPUTS), GREEDY, [0])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_finished_request_leaves_the_batch_and_a_prompt_is_read_once(brief, generated, beams):
    rows: list[int] = []

    def count(module, args, given):
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        rows.append(len(tokens))

    decoder = brief.model.get_decoder() if brief.is_encoder_decoder else brief.model
    decoder.register_forward_pre_hook(count, with_kwargs=True)
    texts = numbered(5)
    answer(brief, prompts_of(brief, texts), Decoding(max_new_tokens=10, beams=beams))
    assert rows[0] == len(texts)
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < rows[1] <= beams * len(texts)
    if beams == 1:
        assert sum(rows) == sum(min(len(row), 10) for row in generated)


# Decoding ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def next_token(llm: FrozenLLM, prompt: Prompt, generated_NT: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, V) of the next token after each of N partial answers, without cache and padding."""
    n = len(generated_NT)
    embeds = embeds_of(llm, prompt).expand(n, -1, -1)
    if llm.is_encoder_decoder:
        decoder_ids = torch.cat([torch.zeros(n, 1, dtype=torch.long), generated_NT], dim=1)
        logits = llm.model(inputs_embeds=embeds, decoder_input_ids=decoder_ids).logits
    else:
        logits = llm.model(inputs_embeds=torch.cat([embeds, llm.embed(generated_NT)], dim=1)).logits
    return torch.log_softmax(logits[:, -1], dim=-1)


def test_greedy_takes_the_likeliest_token_at_each_step(llm, generated):
    [prompt] = prompts_of(llm, ["the movie is"])
    expected: list[int] = []
    for _ in range(6):
        so_far = torch.tensor([expected], dtype=torch.long)
        expected.append(int(next_token(llm, prompt, so_far)[0].argmax()))
    [found] = answer(llm, [prompt], Decoding(max_new_tokens=6, beams=1))
    assert generated == [expected]
    assert found.text == llm.tokenizer.pretrained.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("seed", range(3))
def test_beam_search_finds_the_likeliest_answer(llm, seed, generated):
    """With as many beams as tokens, a search of two steps is exhaustive; compare with trying all pairs."""
    [prompt] = prompts_of(llm, ["the movie is"], seed)
    first_V = next_token(llm, prompt, torch.empty(1, 0, dtype=torch.long))[0]
    n_tokens = len(first_V)
    both_VV = first_V.unsqueeze(1) + next_token(llm, prompt, torch.arange(n_tokens).unsqueeze(1))
    both_VV[llm.tokenizer.end_id] = -torch.inf  # a finished answer has no second token
    answer(llm, [prompt], Decoding(max_new_tokens=2, beams=n_tokens))
    assert generated == [list(divmod(int(both_VV.argmax()), n_tokens))]


def test_a_sample_depends_on_its_seed(llm):
    [prompt] = prompts_of(llm, ["the movie"])
    answers = answer(llm, [prompt] * 8, SAMPLE, range(8))
    assert len({answer.text for answer in answers}) > 4
    assert answer(llm, [prompt] * 8, SAMPLE, [3] * 8) == [answers[3]] * 8


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_answers_equal_those_of_transformers(brief, generated, beams, seed):
    """`transformers.generate` row by row without padding, compared with one batch that shrinks as rows end."""
    prompts = prompts_of(brief, [*INPUTS, *numbered(5)], seed)
    eos = json.loads((Path(brief.model.name_or_path) / "generation_config.json").read_text())["eos_token_id"]
    eos = sorted({*eos, brief.tokenizer.end_id})
    expected = []
    for prompt in prompts:
        embeds = embeds_of(brief, prompt)
        [row] = brief.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            generation_config=GenerationConfig(
                max_new_tokens=12, num_beams=beams, do_sample=False, eos_token_id=eos, pad_token_id=0,
                decoder_start_token_id=getattr(brief.model.config, "decoder_start_token_id", None),
            ),
        ).tolist()  # fmt: skip
        expected.append(row[1:] if brief.is_encoder_decoder else row)
    answer(brief, prompts, Decoding(max_new_tokens=12, beams=beams))
    assert [until(row, eos) for row in generated] == [until(row, eos) for row in expected]
    assert len({len(until(row, eos)) for row in generated}) > 2


def until(row: list[int], eos: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in eos), None)]


def test_an_answer_ends_at_any_declared_end_or_at_the_limit(llm, llm_folder, tmp_path, generated):
    prompts = prompts_of(llm, ["the movie is"])
    [whole] = answer(llm, prompts, GREEDY)
    [tokens] = generated
    assert (whole.finish_reason, whole.n_tokens) == ("length", 10)
    end = tokens[4]
    first = tokens.index(end)
    folder = folder_with(llm_folder, tmp_path / "other", eos_token_id=end)
    [cut] = answer(FrozenLLM.load(folder, precision="fp32", device="cpu"), prompts, GREEDY)
    assert (cut.finish_reason, cut.n_tokens) == ("stop", first)
    assert cut.text == llm.tokenizer.pretrained.decode(tokens[:first], skip_special_tokens=True).strip()


@pytest.mark.parametrize("declared_by", ["model", "tokenizer"])
def test_end_of_sequence_tokens_of_model_and_tokenizer_both_end_an_answer(
    llm, llm_folder, tmp_path, generated, declared_by
):
    prompts = prompts_of(llm, ["the movie is"])
    answer(llm, prompts, GREEDY)
    [whole] = generated
    folder = folder_with(llm_folder, tmp_path / "other", eos_token_id=[whole[4]] if declared_by == "model" else [9])
    if declared_by == "tokenizer":
        names = json.loads((Path(folder.path) / "tokenizer_config.json").read_text())
        names["eos_token"] = llm.tokenizer.pretrained.convert_ids_to_tokens(whole[4])
        (Path(folder.path) / "tokenizer_config.json").write_text(json.dumps(names))
        folder = resolve(str(folder.path), flag="--llm")
    [cut] = answer(FrozenLLM.load(folder, precision="fp32", device="cpu"), prompts, GREEDY)
    assert (cut.finish_reason, cut.n_tokens) == ("stop", whole.index(whole[4]))


# What the LLM reads -----------------------------------------------------------------------------------------


def test_soft_tokens_change_the_answer(llm):
    answers = {answer(llm, prompts_of(llm, ["the movie is"], seed), GREEDY)[0].text for seed in range(4)}
    assert len(answers) > 1


def test_retrieved_texts_change_the_answer_in_any_batch(llm):
    retrieved = [["i like it", "the movie"], [], ["a paper " * 9]]
    prompts = prompts_of(llm, INPUTS[:3], retrieved=retrieved)
    answers = answer(llm, prompts, GREEDY)
    assert answers == [answer(llm, [prompt], GREEDY)[0] for prompt in prompts]
    assert answers != answer(llm, prompts_of(llm, INPUTS[:3]), GREEDY)
    # The same prompts, all given as soft tokens.
    for prompt, expected in zip(prompts, answers, strict=True):
        as_soft = Prompt(ids=PromptIds(before=[], after=[]), soft_SD=embeds_of(llm, prompt)[0])
        assert answer(llm, [as_soft], GREEDY) == [expected]


def test_the_engine_is_found_by_its_name_and_answers_like_its_llm(llm, llm_folder):
    settings = EngineSettings(max_input_tokens=256, prompt=PromptOptions(), precision="fp32", batch_size=2)
    engine = engine_module("local").load(llm_folder, settings)
    prompts = prompts_of(llm, INPUTS)
    assert engine.answer(prompts, GREEDY, [0] * len(prompts)) == answer(llm, prompts, GREEDY)
    assert (engine.width, engine.dtype) == (llm.width, llm.dtype)
