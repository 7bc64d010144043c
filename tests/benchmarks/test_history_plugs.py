"""Plugs that read more of a history than one mean."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from persona.options import PlugOptions
from persona.plug.module import Plug
from persona.store import vectors
from tests.benchmarks import ceiling_data, history_plugs

WIDTH, LLM_WIDTH, TOKENS = 12, 16, 4
LENGTHS = torch.tensor([5, 0, 1, 2])


def histories() -> Tensor:
    drawn = torch.randn(int(LENGTHS.sum()), WIDTH, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=-1)


def new_plug(name: str) -> Plug:
    torch.manual_seed(0)
    options = PlugOptions(weights="mean", persona_tokens=TOKENS, persona_gain=4.0)
    kind = history_plugs.PLUGS.get(name, Plug)
    plug = kind(options, query_encoder=None, width=WIDTH, llm_width=LLM_WIDTH, token_norm=1.0)
    plug.set_typical_behavior(histories())
    if isinstance(plug, history_plugs.Resampler | history_plugs.Peers):
        plug.start(histories(), seed=0)
    return plug


def personas(plug: Plug, history_Md: Tensor, lengths_B: Tensor) -> Tensor:
    with torch.no_grad():
        return plug.persona(history_Md, lengths_B, plug.weigh(history_Md, lengths_B, None))


@pytest.mark.parametrize("name", history_plugs.PLUGS)
def test_a_history_has_the_same_tokens_alone_as_among_others_and_an_empty_one_those_of_the_plug(name: str):
    plug, history_Md = new_plug(name), histories()
    together_BKD = personas(plug, history_Md, LENGTHS)
    assert together_BKD.shape == (len(LENGTHS), TOKENS, LLM_WIDTH)
    for number, part_Nd in enumerate(history_Md.split(LENGTHS.tolist())):
        alone_1KD = personas(plug, part_Nd, LENGTHS[number : number + 1])
        torch.testing.assert_close(alone_1KD[0], together_BKD[number])
    torch.testing.assert_close(together_BKD[1], personas(new_plug("tokens"), history_Md[:0], LENGTHS[1:2])[0])


def test_a_resampler_without_queries_reads_the_mean():
    plug, history_Md = new_plug("resampler"), histories()
    usual_BKD = personas(new_plug("tokens"), history_Md, LENGTHS)
    assert (personas(plug, history_Md, LENGTHS) - usual_BKD).abs().max() > 0.01
    with torch.no_grad():
        plug.get_parameter("queries_Kd").zero_()
    torch.testing.assert_close(personas(plug, history_Md, LENGTHS), usual_BKD)


def test_the_last_tokens_of_latest_are_those_of_single_behaviors_nearer_to_the_typical_one():
    plug, history_Md = new_plug("latest"), histories()
    single_BKD = personas(new_plug("tokens"), history_Md[:5], torch.ones(5, dtype=torch.long))
    typical_KD = personas(new_plug("tokens"), history_Md[:0], torch.zeros(1, dtype=torch.long))[0]
    got_KD = personas(plug, history_Md, LENGTHS)[0]
    near_BKD = typical_KD + (single_BKD - typical_KD) / history_plugs._SINGLE_DISTANCE
    torch.testing.assert_close(got_KD[2], near_BKD[3, 2])
    torch.testing.assert_close(got_KD[3], near_BKD[4, 3])
    torch.testing.assert_close(got_KD[:2], personas(new_plug("tokens"), history_Md, LENGTHS)[0, :2])


def test_peers_of_behaviors_at_the_centers_have_nothing_of_their_own():
    plug, history_Md = new_plug("peers"), histories()
    # As many centers as behaviors: each is its own.
    got_KD, typical_KD = personas(plug, history_Md, LENGTHS)[[0, 1]]
    torch.testing.assert_close(got_KD[TOKENS // 2 :], typical_KD[TOKENS // 2 :])
    assert (got_KD[: TOKENS // 2] - typical_KD[: TOKENS // 2]).abs().max() > 0.01


@pytest.mark.parametrize("name", history_plugs.PLUGS)
def test_all_new_weights_are_trained(name: str):
    plug, history_Md = new_plug(name), histories()
    plug.persona(history_Md, LENGTHS, plug.weigh(history_Md, LENGTHS, None)).square().sum().backward()
    for key, parameter in plug.named_parameters():
        if key != "instruction":
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key


def test_each_seen_behavior_is_taken_once():
    history_Nd = histories()[:5].numpy().astype(np.float16)
    table = pa.table(
        {
            "user_id": ["b", "a", "b"],
            "history": pa.array([vectors.to_bytes(history_Nd[:n]) for n in (2, 1, 4)], pa.large_binary()),
        }
    )
    np.testing.assert_array_equal(
        ceiling_data.seen_behaviors(table, WIDTH), np.concatenate([history_Nd[:1], history_Nd[:4]])
    )
