"""The frozen LLM, T5-like and Llama-like: losses as Hugging Face has them, answers, and what padding must not do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from persona.models import frozen_llm as llm_module
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder, resolve
from persona.options import Decoding

INPUTS = ["the movie is", "", "a paper with a title " * 12, "i like it", "rating\n{of} one"]
TARGETS = ["good", "a longer target in two lines\nof text", "", "three", "x"]
# A loss is a sum of some ten terms of size 10, each after some hundred float32 additions in another order: about
# 100 · 2^-24 relative.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-4}
GREEDY, BEAMS = Decoding(max_new_tokens=10, beams=1), Decoding(max_new_tokens=10, beams=4)
SAMPLE = Decoding(max_new_tokens=10, beams=1, sample=True, sampling_temperature=0.8, top_p=0.9)


def soft_tokens(llm: FrozenLLM, n: int, seed: int = 0) -> torch.Tensor:
    """Three random soft tokens (n, 3, D) a request, as long as the LLM's own."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, 3, llm.width, generator=draw)
    return torch.nn.functional.normalize(tokens, dim=-1) * llm.token_norm()


def nll(llm: FrozenLLM, soft_BSD: torch.Tensor, inputs: list[str], targets: list[str]) -> torch.Tensor:
    return llm.nll(soft_BSD, llm.tokenize_inputs(inputs), llm.tokenize_targets(targets))


def folder_with(folder: ModelFolder, target: Path, **generation_config) -> ModelFolder:
    """The LLM of a folder with other settings in its `generation_config.json`."""
    shutil.copytree(folder.path, target)
    file = target / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **generation_config}))
    return resolve(str(target), flag="--llm")


@pytest.fixture
def brief(llm_folder: ModelFolder, tmp_path: Path) -> FrozenLLM:
    """An LLM that ends its answers soon: beside its own, thirty other tokens end an answer, as a chat model's do."""
    folder = folder_with(llm_folder, tmp_path / "brief", eos_token_id=list(range(1, 31)))
    return FrozenLLM.load(folder, precision="fp32", device="cpu")


# Loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(len(INPUTS)))
def test_the_loss_of_one_row_is_hugging_faces(llm, row):
    soft_1SD = soft_tokens(llm, 1, seed=row)
    text, target = llm.tokenize_inputs([INPUTS[row]])[0], llm.tokenize_targets([TARGETS[row]])[0]
    if llm.is_encoder_decoder:
        embeds = torch.cat([soft_1SD, llm.embed(torch.tensor([text], dtype=torch.long))], dim=1)
        labels = torch.tensor([target])
    else:
        embeds = torch.cat([soft_1SD, llm.embed(torch.tensor([text + target]))], dim=1)
        labels = torch.tensor([[-100] * (3 + len(text)) + target])
    expected = llm.model(inputs_embeds=embeds, labels=labels).loss * len(target)
    torch.testing.assert_close(nll(llm, soft_1SD, [INPUTS[row]], [TARGETS[row]])[0], expected, **FLOAT32)


def test_retrieved_texts_stand_in_front_of_the_soft_tokens(llm):
    soft_BSD = soft_tokens(llm, 3)
    inputs, targets = llm.tokenize_inputs(INPUTS[:3]), llm.tokenize_targets(TARGETS[:3])
    fronts = llm.tokenize_fronts([["i like it", "the movie"], [], ["a paper " * 9]], 12)
    assert fronts[1] == []
    together = llm.nll(soft_BSD, inputs, targets, fronts)
    without = llm.nll(soft_BSD, inputs, targets)
    for i, front in enumerate(fronts):
        # The same row, with the text given as soft tokens in front of the others.
        as_soft = llm.embed(torch.tensor([front], dtype=torch.long))
        expected = llm.nll(torch.cat([as_soft, soft_BSD[i : i + 1]], dim=1), inputs[i : i + 1], targets[i : i + 1])[0]
        torch.testing.assert_close(together[i], expected, **FLOAT32)
        assert (together[i] == pytest.approx(without[i].item(), rel=1e-4)) == (not front)
    seeds = range(3)
    answers = llm.generate(soft_BSD, inputs, GREEDY, seeds, fronts)
    alone = [llm.generate(soft_BSD[i : i + 1], inputs[i : i + 1], GREEDY, [0], fronts[i : i + 1])[0] for i in seeds]
    assert answers == alone
    assert answers != llm.generate(soft_BSD, inputs, GREEDY, seeds)


def test_no_gradient_passes_through_retrieved_texts_and_all_else_is_as_if_one_did(llm):
    fronts = llm.tokenize_fronts([["i like it", "the movie"], [], ["a paper " * 9]], 12)
    inputs, targets = llm.tokenize_inputs(INPUTS[:3]), llm.tokenize_targets(TARGETS[:3])
    calls = read_by(llm)

    def run(fronts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        soft_BSD = soft_tokens(llm, 3).requires_grad_()
        losses = llm.nll(soft_BSD, inputs, targets, fronts)
        losses.sum().backward()
        return losses.detach(), soft_BSD.grad

    found = run(fronts)
    longest = 3 + max(len(text) + len(target) for text, target in zip(inputs, targets, strict=True))
    assert llm.is_encoder_decoder or calls[-1]["inputs_embeds"].shape[1] == longest
    torch.testing.assert_close(run([[], [], []]), run([]), **FLOAT32)
    llm.checkpoint_activations()  # under which everything is read at once
    torch.testing.assert_close(run(fronts), found, **FLOAT32)
    assert llm.is_encoder_decoder or calls[-1]["inputs_embeds"].shape[1] > longest


def test_retrieved_texts_share_their_tokens_equally(llm):
    text = "the movie is a paper in a title of it "
    one, two, tight = llm.tokenize_fronts([[text], [text, text], [text] * 3], 6)
    ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    n, end = len(llm.separator), llm.separator
    assert one == ids[: 6 - n] + end
    assert two == (ids[: 3 - n] + end) * 2
    assert tight == (ids[: 2 - n] + end) * 3
    # Without room for a single token of each, what is left are separators, never more than were asked for.
    assert all(len(front) <= 3 * max(n, 1) for front in llm.tokenize_fronts([[text] * 3], 3))


def test_a_bare_llm_reads_the_text_alone(llm):
    inputs, targets = llm.tokenize_inputs(INPUTS[:1]), llm.tokenize_targets(TARGETS[:1])
    ids = torch.tensor(inputs)
    if llm.is_encoder_decoder:
        expected = llm.model(input_ids=ids, labels=torch.tensor(targets)).loss * len(targets[0])
    else:
        labels = torch.tensor([[-100] * ids.shape[1] + targets[0]])
        expected = llm.model(input_ids=torch.tensor([inputs[0] + targets[0]]), labels=labels).loss * len(targets[0])
    found = llm.nll(torch.empty(1, 0, llm.width), inputs, targets)[0]
    torch.testing.assert_close(found, expected, **FLOAT32)


def test_a_row_has_the_same_loss_in_any_batch(llm):
    soft_BSD = soft_tokens(llm, len(INPUTS))
    together = nll(llm, soft_BSD, INPUTS, TARGETS)
    alone = [nll(llm, soft_BSD[i : i + 1], [INPUTS[i]], [TARGETS[i]])[0] for i in range(len(INPUTS))]
    torch.testing.assert_close(together, torch.stack(alone), **FLOAT32)
    reverse = nll(llm, soft_BSD.flip(0), INPUTS[::-1], TARGETS[::-1]).flip(0)
    torch.testing.assert_close(together, reverse, **FLOAT32)


def test_losses_are_float32_also_of_an_llm_in_half_precision(llm):
    llm.model.to(torch.bfloat16)
    losses_B = nll(llm, soft_tokens(llm, 2), INPUTS[:2], TARGETS[:2])
    assert losses_B.dtype is torch.float32
    # More than bf16's eight bits are there.
    assert not torch.equal(losses_B, losses_B.bfloat16().float())


def test_logits_are_computed_at_target_positions_only(llm):
    seen = []
    llm.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    nll(llm, soft_tokens(llm, len(INPUTS)), INPUTS, TARGETS)
    longest = max(map(len, llm.tokenize_targets(TARGETS)))
    # A decoder-only LLM predicts the first target token at the last token of the text.
    assert seen == [longest if llm.is_encoder_decoder else longest + 1]


@pytest.mark.parametrize("position", range(3))
def test_every_soft_token_is_read_and_learns(llm, position):
    soft_BSD = soft_tokens(llm, 2).requires_grad_()
    nll(llm, soft_BSD, INPUTS[:2], TARGETS[:2]).sum().backward()
    assert (soft_BSD.grad[:, position].norm(dim=-1) > 0).all()
    assert all(parameter.grad is None for parameter in llm.parameters())


def test_a_request_does_not_see_its_neighbours_soft_tokens(llm):
    soft_BSD = soft_tokens(llm, 3).requires_grad_()
    nll(llm, soft_BSD, INPUTS[:3], TARGETS[:3])[1].backward()
    assert soft_BSD.grad[1].any()
    assert not soft_BSD.grad[[0, 2]].any()


def test_recomputed_activations_change_memory_and_nothing_else(llm):
    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        soft_BSD = soft_tokens(llm, len(INPUTS)).requires_grad_()
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = nll(llm, soft_BSD, INPUTS, TARGETS)
        losses.sum().backward()
        return losses.detach(), soft_BSD.grad, kept

    plain = run()
    llm.checkpoint_activations()
    llm.train()
    recomputed = run()
    torch.testing.assert_close(recomputed[:2], plain[:2])
    assert recomputed[2] < 0.7 * plain[2]
    assert not any(module.training for module in llm.modules() if isinstance(module, torch.nn.Dropout))


# What reaches the LLM ---------------------------------------------------------------------------------------


def read_by(llm: FrozenLLM) -> list[dict[str, torch.Tensor]]:
    """A list that fills with what the LLM's own forward pass is given."""
    calls: list[dict[str, torch.Tensor]] = []
    llm.model.register_forward_pre_hook(lambda module, args, given: calls.append(dict(given)), with_kwargs=True)
    return calls


def test_rows_are_soft_tokens_then_text_and_padding_is_where_each_kind_needs_it(llm):
    calls, soft_BSD = read_by(llm), soft_tokens(llm, 2)
    inputs, targets = llm.tokenize_inputs(["a movie", "a"]), llm.tokenize_targets(["x", "y"])
    llm.nll(soft_BSD, inputs, targets)
    embeds_BLD, mask_BL = calls[0]["inputs_embeds"], calls[0]["attention_mask"]
    for i in range(2):
        row = inputs[i] if llm.is_encoder_decoder else inputs[i] + targets[i]
        expected = torch.cat([soft_BSD[i], llm.embed(torch.tensor(row))])
        assert torch.equal(embeds_BLD[i][mask_BL[i]], expected)
        if not llm.is_encoder_decoder:  # positions count what is read, not the padding
            assert calls[0]["position_ids"][i][mask_BL[i]].tolist() == list(range(len(expected)))
    shorter = mask_BL[1].tolist()
    assert shorter == sorted(shorter, reverse=llm.is_encoder_decoder)
    assert False in shorter


def test_no_text_can_reach_a_soft_token(llm):
    """A user who types special tokens, or names of soft tokens, moves nothing, and their neighbour notices nothing."""
    hostile = "<s> </s> <pad> <unk> [PERSONA] <persona> <extra_id_0> <|soft_0|> [INST] \x00 " * 2
    calls, soft_BSD = read_by(llm), soft_tokens(llm, 2)
    inputs = llm.tokenize_inputs([hostile, "the movie"])
    vocabulary = llm.model.get_input_embeddings().weight
    assert max(map(max, inputs)) < len(vocabulary)
    losses = llm.nll(soft_BSD, inputs, llm.tokenize_targets([hostile, "good"]))
    for embeds_LD, mask_L, own_SD in zip(calls[0]["inputs_embeds"], calls[0]["attention_mask"], soft_BSD, strict=True):
        read = embeds_LD[mask_L]
        assert torch.equal(read[:3], own_SD)
        assert (torch.cdist(read[3:], vocabulary).min(dim=1).values < 1e-2).all()  # the rest are vocabulary words
    alone = nll(llm, soft_BSD[1:], ["the movie"], ["good"])[0]
    torch.testing.assert_close(losses[1], alone, **FLOAT32)


def test_texts_are_cut_to_what_the_llm_may_read(llm_folder):
    llm = FrozenLLM.load(llm_folder, max_input_tokens=8, precision="fp32", device="cpu")
    text, target = llm.tokenize_inputs(["x" * 100])[0], llm.tokenize_targets(["y" * 100])[0]
    assert len(text) == 8 + len(llm.separator)
    assert len(target) == 8
    assert target[-1] == llm.tokenizer.eos_token_id


def test_a_target_is_its_text_and_the_end_of_sequence(llm):
    for target, ids in zip(TARGETS, llm.tokenize_targets(TARGETS), strict=True):
        assert ids[-1] == llm.tokenizer.eos_token_id
        assert llm.tokenizer.bos_token_id not in ids
        assert llm.tokenizer.decode(ids[:-1]).split() == target.split()


def test_request_and_answer_of_a_decoder_only_llm_do_not_run_together(llm):
    [text] = llm.tokenize_inputs(["the movie"])
    assert llm.tokenizer.decode(text).endswith("movie</s>" if llm.is_encoder_decoder else "movie\n")


def test_no_texts_are_no_rows(llm):
    assert llm.tokenize_inputs([]) == llm.tokenize_targets([]) == []


# Frozen -----------------------------------------------------------------------------------------------------


def test_frozen_means_eval_mode_also_when_the_whole_is_put_into_train_mode(llm):
    whole = torch.nn.ModuleDict({"llm": llm}).train()
    assert whole.training
    assert not any(module.training for module in llm.modules())
    soft_BSD = soft_tokens(llm, 2)
    assert torch.equal(nll(llm, soft_BSD, INPUTS[:2], TARGETS[:2]), nll(llm, soft_BSD, INPUTS[:2], TARGETS[:2]))


def test_nothing_of_the_llm_can_be_trained(llm):
    assert not any(parameter.requires_grad for parameter in llm.parameters())


def test_the_token_norm_is_the_mean_over_the_vocabulary(llm):
    norms = llm.model.get_input_embeddings().weight.norm(dim=-1)
    assert llm.token_norm() == pytest.approx(norms.mean().item(), rel=1e-6)
    assert norms.min().item() < llm.token_norm(sample=16) < norms.max().item()


# Answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, SAMPLE], ids=["greedy", "beams", "sample"])
def test_a_request_gets_the_same_answer_alone_and_in_any_batch(brief, decoding):
    texts = [*INPUTS, *(f"{text} {number}" for number in range(3) for text in ("title", "it is", "for the paper"))]
    soft_BSD, inputs = soft_tokens(brief, len(texts)), brief.tokenize_inputs(texts)
    seeds = list(range(100, 100 + len(texts)))
    together = brief.generate(soft_BSD, inputs, decoding, seeds)
    alone = [brief.generate(soft_BSD[i : i + 1], [inputs[i]], decoding, [seeds[i]])[0] for i in range(len(texts))]
    assert alone == together
    pairs = [brief.generate(soft_BSD[[i, 2]], [inputs[i], inputs[2]], decoding, [seeds[i], 0])[0] for i in range(5)]
    assert pairs == together[:5]
    assert len({answer.text for answer in together}) > 3
    # Some rows end while others go on, without which nothing would have been tested.
    assert {answer.finish_reason for answer in together} == {"stop", "length"}


@pytest.fixture
def said(monkeypatch) -> list[list[int]]:
    """Fills with the tokens of every answer."""
    answers: list[list[int]] = []

    def listening(decode):
        def listen(*args, **settings):
            found = decode(*args, **settings)
            answers.extend(found)
            return found

        return listen

    for name in ("follow", "search"):
        monkeypatch.setattr(llm_module, name, listening(getattr(llm_module, name)))
    return answers


@torch.no_grad()
def next_word(llm: FrozenLLM, soft_1SD: torch.Tensor, text: list[int], said_NT: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, V) of the next token after each of N beginnings, without cache and without padding."""
    n = len(said_NT)
    if llm.is_encoder_decoder:
        embeds = torch.cat([soft_1SD, llm.embed(torch.tensor([text]))], dim=1).expand(n, -1, -1)
        beginning = torch.cat([torch.zeros(n, 1, dtype=torch.long), said_NT], dim=1)
        logits = llm.model(inputs_embeds=embeds, decoder_input_ids=beginning).logits
    else:
        embeds = torch.cat([soft_1SD, llm.embed(torch.tensor([text]))], dim=1).expand(n, -1, -1)
        logits = llm.model(inputs_embeds=torch.cat([embeds, llm.embed(said_NT)], dim=1)).logits
    return torch.log_softmax(logits[:, -1], dim=-1)


def test_greedy_takes_the_likeliest_token_each_time(llm, said):
    soft_1SD, [text] = soft_tokens(llm, 1), llm.tokenize_inputs(["the movie is"])
    expected: list[int] = []
    for _ in range(6):
        beginning = torch.tensor([expected], dtype=torch.long)
        expected.append(int(next_word(llm, soft_1SD, text, beginning)[0].argmax()))
    [answer] = llm.generate(soft_1SD, [text], Decoding(max_new_tokens=6, beams=1), [0])
    assert said == [expected]
    assert answer.text == llm.tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("seed", range(3))
def test_beams_find_the_likeliest_answer(llm, seed, said):
    """With as many beams as words, two tokens are searched completely; here they are by trying all."""
    soft_1SD, [text] = soft_tokens(llm, 1, seed), llm.tokenize_inputs(["the movie is"])
    first_V = next_word(llm, soft_1SD, text, torch.empty(1, 0, dtype=torch.long))[0]
    n_words = len(first_V)
    both_VV = first_V.unsqueeze(1) + next_word(llm, soft_1SD, text, torch.arange(n_words).unsqueeze(1))
    both_VV[llm.tokenizer.eos_token_id] = -torch.inf  # an answer that is over has no second token
    llm.generate(soft_1SD, [text], Decoding(max_new_tokens=2, beams=n_words), [0])
    assert said == [list(divmod(int(both_VV.argmax()), n_words))]


def test_what_is_sampled_depends_on_the_seed(llm):
    soft_BSD, inputs = soft_tokens(llm, 1).expand(8, -1, -1), llm.tokenize_inputs(["the movie"] * 8)
    answers = llm.generate(soft_BSD, inputs, SAMPLE, list(range(8)))
    assert len({answer.text for answer in answers}) > 4
    assert llm.generate(soft_BSD, inputs, SAMPLE, [3] * 8) == [answers[3]] * 8


def test_an_answer_ends_at_any_declared_end_or_at_the_limit(llm, llm_folder, tmp_path, said):
    soft_1SD, inputs = soft_tokens(llm, 1), llm.tokenize_inputs(["the movie is"])
    [whole] = llm.generate(soft_1SD, inputs, GREEDY, [0])
    [tokens] = said
    assert (whole.finish_reason, whole.n_tokens) == ("length", 10)
    end = tokens[4]
    first = tokens.index(end)
    other = FrozenLLM.load(
        folder_with(llm_folder, tmp_path / "other", eos_token_id=end), precision="fp32", device="cpu"
    )
    [cut] = other.generate(soft_1SD, inputs, GREEDY, [0])
    assert (cut.finish_reason, cut.n_tokens) == ("stop", first)
    assert cut.text == llm.tokenizer.decode(tokens[:first], skip_special_tokens=True).strip()


@pytest.mark.parametrize("declared", ["by the model", "by the tokenizer alone"])
def test_the_models_and_the_tokenizers_end_count(llm, llm_folder, tmp_path, said, declared):
    soft_1SD, inputs = soft_tokens(llm, 1), llm.tokenize_inputs(["the movie is"])
    llm.generate(soft_1SD, inputs, GREEDY, [0])
    [whole] = said
    folder = folder_with(llm_folder, tmp_path / "other", eos_token_id=[whole[4]] if declared == "by the model" else [9])
    if declared != "by the model":
        names = json.loads((Path(folder.path) / "tokenizer_config.json").read_text())
        names["eos_token"] = llm.tokenizer.convert_ids_to_tokens(whole[4])
        (Path(folder.path) / "tokenizer_config.json").write_text(json.dumps(names))
        folder = resolve(str(folder.path), flag="--llm")
    other = FrozenLLM.load(folder, precision="fp32", device="cpu")
    [answer] = other.generate(soft_1SD, inputs, GREEDY, [0])
    assert (answer.finish_reason, answer.n_tokens) == ("stop", whole.index(whole[4]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_answers_are_those_of_transformers(brief, said, beams, seed):
    """Row by row without padding, by `transformers.generate`; here all in one batch that shrinks as rows end."""
    texts = [*INPUTS, *(f"{text} {number}" for number in range(5) for text in ("title", "it is", "for the paper"))]
    soft_BSD, inputs = soft_tokens(brief, len(texts), seed), brief.tokenize_inputs(texts)
    ends = json.loads((Path(brief.model.name_or_path) / "generation_config.json").read_text())["eos_token_id"]
    ends = sorted({*ends, brief.tokenizer.eos_token_id})
    expected = []
    for soft_SD, ids in zip(soft_BSD, inputs, strict=True):
        embeds = torch.cat([soft_SD.unsqueeze(0), brief.embed(torch.tensor([ids], dtype=torch.long))], dim=1)
        [row] = brief.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            generation_config=GenerationConfig(
                max_new_tokens=12, num_beams=beams, do_sample=False, eos_token_id=ends, pad_token_id=0,
                decoder_start_token_id=getattr(brief.model.config, "decoder_start_token_id", None),
            ),
        ).tolist()  # fmt: skip
        expected.append(row[1:] if brief.is_encoder_decoder else row)
    brief.generate(soft_BSD, inputs, Decoding(max_new_tokens=12, beams=beams), [0] * len(texts))
    assert [until(row, ends) for row in said] == [until(row, ends) for row in expected]
    assert len({len(until(row, ends)) for row in said}) > 2


def until(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), None)]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_finished_request_costs_no_more_steps_and_a_prompt_is_read_once(brief, said, beams):
    read: list[int] = []

    def listen(module, args, given):
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        read.append(len(tokens))

    decoder = brief.model.get_decoder() if brief.is_encoder_decoder else brief.model
    decoder.register_forward_pre_hook(listen, with_kwargs=True)
    texts = [f"{text} {number}" for number in range(5) for text in ("title", "it is", "for the paper")]
    soft_BSD, inputs = soft_tokens(brief, len(texts)), brief.tokenize_inputs(texts)
    brief.generate(soft_BSD, inputs, Decoding(max_new_tokens=10, beams=beams), [0] * len(texts))
    assert read[0] == len(texts)
    assert read[1:] == sorted(read[1:], reverse=True)
    assert read[-1] < read[1] <= beams * len(texts)
    if beams == 1:
        assert sum(read) == sum(min(len(row), 10) for row in said)


def test_what_a_model_would_decode_with_by_itself_changes_no_answer(llm, llm_folder, tmp_path):
    """Penalties and the like in `generation_config.json` are not in an answer's fingerprint, so they must not act."""
    folder = folder_with(
        llm_folder,
        tmp_path / "penalties",
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        length_penalty=-3.0,
        suppress_tokens=list(range(40, 90)),
        do_sample=True,
        temperature=0.1,
        num_beams=3,
    )
    other = FrozenLLM.load(folder, precision="fp32", device="cpu")
    soft_BSD, inputs = soft_tokens(llm, len(INPUTS)), llm.tokenize_inputs(INPUTS)
    for decoding in (GREEDY, BEAMS):
        seeds = [0] * len(INPUTS)
        assert other.generate(soft_BSD, inputs, decoding, seeds) == llm.generate(soft_BSD, inputs, decoding, seeds)


def test_soft_tokens_change_the_answer(llm):
    inputs = llm.tokenize_inputs(["the movie is"])
    answers = {llm.generate(soft_tokens(llm, 1, seed), inputs, GREEDY, [0])[0].text for seed in range(4)}
    assert len(answers) > 1
