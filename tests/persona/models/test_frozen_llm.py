"""The frozen LLM, T5-like and Llama-like: losses equal those of transformers, and padding changes nothing."""

import pytest
import torch

from persona.models.frozen_llm import FrozenLLM
from tests.plugs import random_soft_tokens

INPUTS = ["the movie is", "", "a paper with a title " * 12, "i like it", "rating\n{of} one"]
TARGETS = ["good", "a longer target in two lines\nof text", "", "three", "x"]
# A loss is a sum of about ten terms of size 10, each after some hundred float32 additions in another order: about
# 100 · 2^-24 relative.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-4}


def nll(llm: FrozenLLM, soft_BSD: torch.Tensor, inputs: list[str], targets: list[str]) -> torch.Tensor:
    return llm.nll(soft_BSD, llm.tokenizer.inputs(inputs), llm.tokenizer.targets(targets))


def record_calls(llm: FrozenLLM) -> list[dict[str, torch.Tensor]]:
    """A list that fills with the arguments of the LLM's forward passes."""
    calls: list[dict[str, torch.Tensor]] = []
    llm.model.register_forward_pre_hook(lambda module, args, given: calls.append(dict(given)), with_kwargs=True)
    return calls


# Loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(len(INPUTS)))
def test_the_loss_of_one_row_equals_that_of_transformers(llm, row):
    soft_1SD = random_soft_tokens(llm, 1, seed=row)
    text, target = llm.tokenizer.inputs([INPUTS[row]])[0], llm.tokenizer.targets([TARGETS[row]])[0]
    if llm.is_encoder_decoder:
        embeds = torch.cat([soft_1SD, llm.embed(torch.tensor([text], dtype=torch.long))], dim=1)
        labels = torch.tensor([target])
    else:
        embeds = torch.cat([soft_1SD, llm.embed(torch.tensor([text + target]))], dim=1)
        labels = torch.tensor([[-100] * (3 + len(text)) + target])
    expected = llm.model(inputs_embeds=embeds, labels=labels).loss * len(target)
    torch.testing.assert_close(nll(llm, soft_1SD, [INPUTS[row]], [TARGETS[row]])[0], expected, **FLOAT32)


def test_prefixes_come_before_the_soft_tokens(llm):
    soft_BSD = random_soft_tokens(llm, 3)
    inputs, targets = llm.tokenizer.inputs(INPUTS[:3]), llm.tokenizer.targets(TARGETS[:3])
    prefix_ids = llm.tokenizer.prefixes([["i like it", "the movie"], [], ["a paper " * 9]], 12)
    assert prefix_ids[1] == []
    together = llm.nll(soft_BSD, inputs, targets, prefix_ids)
    without = llm.nll(soft_BSD, inputs, targets)
    for i, prefix in enumerate(prefix_ids):
        # The same row, with the prefix given as soft tokens in front of the others.
        as_soft = llm.embed(torch.tensor([prefix], dtype=torch.long))
        expected = llm.nll(torch.cat([as_soft, soft_BSD[i : i + 1]], dim=1), inputs[i : i + 1], targets[i : i + 1])[0]
        torch.testing.assert_close(together[i], expected, **FLOAT32)
        assert (together[i] == pytest.approx(without[i].item(), rel=1e-4)) == (not prefix)


def test_a_cached_prefix_changes_neither_losses_nor_gradients(llm):
    prefix_ids = llm.tokenizer.prefixes([["i like it", "the movie"], [], ["a paper " * 9]], 12)
    inputs, targets = llm.tokenizer.inputs(INPUTS[:3]), llm.tokenizer.targets(TARGETS[:3])
    calls = record_calls(llm)

    def run(prefix_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        soft_BSD = random_soft_tokens(llm, 3).requires_grad_()
        losses = llm.nll(soft_BSD, inputs, targets, prefix_ids)
        losses.sum().backward()
        return losses.detach(), soft_BSD.grad

    cached = run(prefix_ids)
    longest = 3 + max(len(text) + len(target) for text, target in zip(inputs, targets, strict=True))
    assert llm.is_encoder_decoder or calls[-1]["inputs_embeds"].shape[1] == longest
    torch.testing.assert_close(run([[], [], []]), run([]), **FLOAT32)
    llm.checkpoint_activations()  # prefixes are then part of the row
    torch.testing.assert_close(run(prefix_ids), cached, **FLOAT32)
    assert llm.is_encoder_decoder or calls[-1]["inputs_embeds"].shape[1] > longest


def test_the_bare_llm_reads_only_the_text(llm):
    inputs, targets = llm.tokenizer.inputs(INPUTS[:1]), llm.tokenizer.targets(TARGETS[:1])
    ids = torch.tensor(inputs)
    if llm.is_encoder_decoder:
        expected = llm.model(input_ids=ids, labels=torch.tensor(targets)).loss * len(targets[0])
    else:
        labels = torch.tensor([[-100] * ids.shape[1] + targets[0]])
        expected = llm.model(input_ids=torch.tensor([inputs[0] + targets[0]]), labels=labels).loss * len(targets[0])
    found = llm.nll(torch.empty(1, 0, llm.width), inputs, targets)[0]
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
    llm.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    nll(llm, random_soft_tokens(llm, len(INPUTS)), INPUTS, TARGETS)
    longest = max(map(len, llm.tokenizer.targets(TARGETS)))
    # A decoder-only LLM predicts the first target token at the last token of the text.
    assert seen == [longest if llm.is_encoder_decoder else longest + 1]


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


def test_rows_are_soft_tokens_then_text_padded_on_the_side_that_each_kind_needs(llm):
    calls, soft_BSD = record_calls(llm), random_soft_tokens(llm, 2)
    inputs, targets = llm.tokenizer.inputs(["a movie", "a"]), llm.tokenizer.targets(["x", "y"])
    llm.nll(soft_BSD, inputs, targets)
    embeds_BLD, mask_BL = calls[0]["inputs_embeds"], calls[0]["attention_mask"]
    for i in range(2):
        row = inputs[i] if llm.is_encoder_decoder else inputs[i] + targets[i]
        expected = torch.cat([soft_BSD[i], llm.embed(torch.tensor(row))])
        assert torch.equal(embeds_BLD[i][mask_BL[i]], expected)
        if not llm.is_encoder_decoder:  # positions do not count padding
            assert calls[0]["position_ids"][i][mask_BL[i]].tolist() == list(range(len(expected)))
    shorter = mask_BL[1].tolist()
    assert shorter == sorted(shorter, reverse=llm.is_encoder_decoder)
    assert False in shorter


def test_no_text_can_become_a_soft_token(llm):
    """Special tokens or names of soft tokens in a text affect neither soft tokens nor the neighboring request."""
    hostile = "<s> </s> <pad> <unk> [PERSONA] <persona> <extra_id_0> <|soft_0|> [INST] \x00 " * 2
    calls, soft_BSD = record_calls(llm), random_soft_tokens(llm, 2)
    inputs = llm.tokenizer.inputs([hostile, "the movie"])
    vocabulary = llm.model.get_input_embeddings().weight
    assert max(map(max, inputs)) < len(vocabulary)
    losses = llm.nll(soft_BSD, inputs, llm.tokenizer.targets([hostile, "good"]))
    for embeds_LD, mask_L, own_SD in zip(calls[0]["inputs_embeds"], calls[0]["attention_mask"], soft_BSD, strict=True):
        read = embeds_LD[mask_L]
        assert torch.equal(read[:3], own_SD)
        assert (torch.cdist(read[3:], vocabulary).min(dim=1).values < 1e-2).all()  # all others are vocabulary tokens
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
