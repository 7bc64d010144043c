"""The frozen LLM, T5-like and Llama-like: losses equal those of transformers, and padding changes nothing."""

from collections.abc import Sequence

import pytest
import torch

from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds, PromptText
from tests.plugs import random_soft_tokens

INPUTS = ["the movie is", "", "a paper with a title " * 12, "i like it", "rating\n{of} one"]
TARGETS = ["good", "a longer target in two lines\nof text", "", "three", "x"]
# A loss is a sum of about ten terms of size 10, each after some hundred float32 additions in another order: about
# 100 · 2^-24 relative.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-4}


def prompts_of(llm: FrozenLLM, inputs: Sequence[str], retrieved: Sequence[Sequence[str]] = ()) -> list[PromptIds]:
    """Prompts with at most twelve tokens of retrieved texts."""
    texts = zip(inputs, retrieved or [[]] * len(inputs), strict=True)
    return llm.tokenizer.prompts([PromptText(input=text, retrieved=past) for text, past in texts], retrieved_tokens=12)


def nll(llm: FrozenLLM, soft_BSD: torch.Tensor, inputs: list[str], targets: list[str]) -> torch.Tensor:
    return llm.nll(soft_BSD, prompts_of(llm, inputs), llm.tokenizer.targets(targets))


def reference_nll(
    llm: FrozenLLM, before: Sequence[int], soft_SD: torch.Tensor, after: Sequence[int], target: list[int]
) -> torch.Tensor:
    """The loss of transformers for one row of embeddings."""
    ids = [torch.tensor(part, dtype=torch.long) for part in (before, after)]
    prompt = torch.cat([llm.embed(ids[0]), soft_SD, llm.embed(ids[1])])
    if llm.is_encoder_decoder:
        return llm.model(inputs_embeds=prompt[None], labels=torch.tensor([target])).loss * len(target)
    embeds = torch.cat([prompt, llm.embed(torch.tensor(target))])
    labels = torch.tensor([[-100] * len(prompt) + target])
    return llm.model(inputs_embeds=embeds[None], labels=labels).loss * len(target)


def record_calls(llm: FrozenLLM) -> list[dict[str, torch.Tensor]]:
    """A list that fills with the arguments of the LLM's forward passes."""
    calls: list[dict[str, torch.Tensor]] = []
    llm.model.register_forward_pre_hook(lambda module, args, given: calls.append(dict(given)), with_kwargs=True)
    return calls


# Loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(len(INPUTS)))
def test_the_loss_of_one_row_equals_that_of_transformers(llm, row):
    soft_1SD = random_soft_tokens(llm, 1, seed=row)
    [prompt], [target] = prompts_of(llm, INPUTS[row : row + 1]), llm.tokenizer.targets(TARGETS[row : row + 1])
    expected = reference_nll(llm, prompt.before, soft_1SD[0], prompt.after, target)
    torch.testing.assert_close(nll(llm, soft_1SD, [INPUTS[row]], [TARGETS[row]])[0], expected, **FLOAT32)


RETRIEVED = [["i like it", "the movie"], [], ["a paper " * 9]]


@pytest.mark.parametrize("cache_before", [False, True])
def test_retrieved_texts_come_before_the_soft_tokens(llm, cache_before):
    soft_BSD = random_soft_tokens(llm, 3)
    prompts, targets = prompts_of(llm, INPUTS[:3], RETRIEVED), llm.tokenizer.targets(TARGETS[:3])
    together = llm.nll(soft_BSD, prompts, targets, cache_before=cache_before)
    without = llm.nll(soft_BSD, prompts_of(llm, INPUTS[:3]), targets)
    for i, prompt in enumerate(prompts):
        expected = reference_nll(llm, prompt.before, soft_BSD[i], prompt.after, targets[i])
        torch.testing.assert_close(together[i], expected, **FLOAT32)
        assert (together[i] == pytest.approx(without[i].item(), rel=1e-4)) == (not RETRIEVED[i])


def test_a_cache_of_what_is_in_front_changes_neither_losses_nor_gradients(llm):
    prompts, targets = prompts_of(llm, INPUTS[:3], RETRIEVED), llm.tokenizer.targets(TARGETS[:3])
    no_texts = [PromptIds(before=[], after=prompt.after) for prompt in prompts]
    calls = record_calls(llm)

    def run(prompts: list[PromptIds], *, cache_before: bool) -> tuple[torch.Tensor, torch.Tensor]:
        soft_BSD = random_soft_tokens(llm, 3).requires_grad_()
        losses = llm.nll(soft_BSD, prompts, targets, cache_before=cache_before)
        losses.sum().backward()
        return losses.detach(), soft_BSD.grad

    plain = run(prompts, cache_before=False)
    torch.testing.assert_close(run(prompts, cache_before=True), plain, **FLOAT32)
    longest = 3 + max(len(prompt.after) + len(target) for prompt, target in zip(prompts, targets, strict=True))
    assert llm.is_encoder_decoder or calls[-1]["inputs_embeds"].shape[1] == longest
    torch.testing.assert_close(run(no_texts, cache_before=True), run(no_texts, cache_before=False), **FLOAT32)
    llm.checkpoint_activations()  # layers are then computed twice with the same cache
    torch.testing.assert_close(run(prompts, cache_before=True), plain, **FLOAT32)
    assert llm.is_encoder_decoder or calls[-1]["inputs_embeds"].shape[1] == longest
    torch.testing.assert_close(run(no_texts, cache_before=True), run(no_texts, cache_before=False), **FLOAT32)


def test_the_bare_llm_reads_only_the_text(llm):
    [prompt], [target] = prompts_of(llm, INPUTS[:1]), llm.tokenizer.targets(TARGETS[:1])
    text = [*prompt.before, *prompt.after]
    if llm.is_encoder_decoder:
        expected = llm.model(input_ids=torch.tensor([text]), labels=torch.tensor([target])).loss * len(target)
    else:
        labels = torch.tensor([[-100] * len(text) + target])
        expected = llm.model(input_ids=torch.tensor([text + target]), labels=labels).loss * len(target)
    found = llm.nll(torch.empty(1, 0, llm.width), [prompt], [target])[0]
    torch.testing.assert_close(found, expected, **FLOAT32)


def test_a_row_has_the_same_loss_in_any_batch(llm):
    soft_BSD = random_soft_tokens(llm, len(INPUTS))
    together = nll(llm, soft_BSD, INPUTS, TARGETS)
    alone = [nll(llm, soft_BSD[i : i + 1], [INPUTS[i]], [TARGETS[i]])[0] for i in range(len(INPUTS))]
    torch.testing.assert_close(together, torch.stack(alone), **FLOAT32)
    reverse = nll(llm, soft_BSD.flip(0), INPUTS[::-1], TARGETS[::-1]).flip(0)
    torch.testing.assert_close(together, reverse, **FLOAT32)


def test_losses_are_float32_even_with_the_llm_in_bf16(llm):
    llm.model.to(torch.bfloat16)
    losses_B = nll(llm, random_soft_tokens(llm, 2), INPUTS[:2], TARGETS[:2])
    assert losses_B.dtype is torch.float32
    # They have more than bf16's eight bits.
    assert not torch.equal(losses_B, losses_B.bfloat16().float())


def test_logits_are_computed_at_target_positions_only(llm):
    seen = []
    llm.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    nll(llm, random_soft_tokens(llm, len(INPUTS)), INPUTS, TARGETS)
    assert seen == [(1, sum(map(len, llm.tokenizer.targets(TARGETS))))]


@pytest.mark.parametrize("position", range(3))
def test_every_soft_token_gets_a_gradient_and_no_weight_of_the_llm_does(llm, position):
    soft_BSD = random_soft_tokens(llm, 2).requires_grad_()
    nll(llm, soft_BSD, INPUTS[:2], TARGETS[:2]).sum().backward()
    assert (soft_BSD.grad[:, position].norm(dim=-1) > 0).all()
    assert all(parameter.grad is None for parameter in llm.parameters())


def test_a_request_does_not_see_the_soft_tokens_of_its_neighbors(llm):
    soft_BSD = random_soft_tokens(llm, 3).requires_grad_()
    nll(llm, soft_BSD, INPUTS[:3], TARGETS[:3])[1].backward()
    assert soft_BSD.grad[1].any()
    assert not soft_BSD.grad[[0, 2]].any()


def test_activation_checkpointing_saves_memory_and_changes_nothing_else(llm):
    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        soft_BSD = random_soft_tokens(llm, len(INPUTS)).requires_grad_()
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            losses = nll(llm, soft_BSD, INPUTS, TARGETS)
        losses.sum().backward()
        return losses.detach(), soft_BSD.grad, saved

    plain = run()
    llm.checkpoint_activations()
    llm.train()
    checkpointed = run()
    torch.testing.assert_close(checkpointed[:2], plain[:2])
    assert checkpointed[2] < 0.7 * plain[2]
    assert not any(module.training for module in llm.modules() if isinstance(module, torch.nn.Dropout))


# What reaches the LLM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_left", [False, True])
def test_a_row_is_texts_then_soft_tokens_then_input(llm, pad_left):
    soft_BSD = random_soft_tokens(llm, 2)
    prompts, targets = (
        prompts_of(llm, ["a movie", "a"], [["the"], ["it is a movie"]]),
        llm.tokenizer.targets(["x", "y"]),
    )
    embeds_BLD, mask_BL = llm.embed_prompts(soft_BSD, prompts, targets, pad_left=pad_left)
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        texts = llm.embed(torch.tensor(prompt.before))
        assert torch.equal(
            embeds_BLD[i][mask_BL[i]],
            torch.cat([texts, soft_BSD[i], llm.embed(torch.tensor([*prompt.after, *target]))]),
        )
    shorter = min(mask_BL.tolist(), key=sum)
    assert shorter == sorted(shorter, reverse=not pad_left)
    assert False in shorter


def test_no_text_can_become_a_soft_token(llm):
    """Special tokens or names of soft tokens in a text affect neither soft tokens nor the neighboring request."""
    hostile = "<s> </s> <pad> <unk> [PERSONA] <persona> <extra_id_0> <|soft_0|> [INST] \x00 " * 2
    soft_BSD = random_soft_tokens(llm, 2)
    prompts = prompts_of(llm, [hostile, "the movie"], [[hostile], ["a"]])
    vocabulary = llm.model.get_input_embeddings().weight
    for embeds_LD, mask_L, prompt, own_SD in zip(*llm.embed_prompts(soft_BSD, prompts), prompts, soft_BSD, strict=True):
        read, first = embeds_LD[mask_L], len(prompt.before)
        assert torch.equal(read[first : first + 3], own_SD)
        others = torch.cat([read[:first], read[first + 3 :]])
        assert (torch.cdist(others, vocabulary).min(dim=1).values < 1e-2).all()  # all others are vocabulary tokens
    losses = nll(llm, soft_BSD, [hostile, "the movie"], [hostile, "good"])
    alone = nll(llm, soft_BSD[1:], ["the movie"], ["good"])[0]
    torch.testing.assert_close(losses[1], alone, **FLOAT32)


# Frozen -----------------------------------------------------------------------------------------------------


def test_the_llm_stays_in_eval_mode_when_its_parent_module_trains(llm):
    parent = torch.nn.ModuleDict({"llm": llm}).train()
    assert parent.training
    assert not any(module.training for module in llm.modules())
    soft_BSD = random_soft_tokens(llm, 2)
    assert torch.equal(nll(llm, soft_BSD, INPUTS[:2], TARGETS[:2]), nll(llm, soft_BSD, INPUTS[:2], TARGETS[:2]))


def test_no_parameter_of_the_llm_can_be_trained(llm):
    assert not any(parameter.requires_grad for parameter in llm.parameters())


def test_the_token_norm_is_the_mean_over_the_vocabulary(llm):
    norms = llm.model.get_input_embeddings().weight.norm(dim=-1)
    assert llm.token_norm() == pytest.approx(norms.mean().item(), rel=1e-6)
    assert norms.min().item() < llm.token_norm(sample=16) < norms.max().item()
