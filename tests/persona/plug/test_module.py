"""The plug against the equations of PPlug (arXiv 2409.11901), written as plain float64 loops over lists of numbers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, BertConfig

from persona.errors import UsageError
from persona.models.sentence_head import SentenceHead
from persona.options import PlugOptions
from persona.plug.module import Plug, Projector

D_ENCODER, D_LLM = 3, 2
# Both sides sum some hundred float64 numbers: 100 · 2^-53 is about 1e-14.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


class FixedQueries(torch.nn.Module):
    """Takes the place of the query encoder in a plug with attention; tests give its vectors."""


def new_plug(seed: int = 0, **options) -> Plug:
    torch.manual_seed(seed)
    basic = {"weights": "attention", "persona_tokens": 2, "persona_gain": 1.0, "temperature": 3.0}
    options = PlugOptions(**{**basic, **options})
    query_encoder = None if options.weights == "mean" else FixedQueries()
    plug = Plug(options, query_encoder=query_encoder, width=D_ENCODER, llm_width=D_LLM, token_norm=1.7).double()
    plug.set_typical_behavior(unit(3, seed=9))
    if options.recency:
        plug.recency_slope.data.fill_(0.7)  # its initial value 0 has no effect
    return plug


def unit(n: int, seed: int, width: int = D_ENCODER) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=draw, dtype=torch.float64), dim=-1)


# The equations, as loops. ---------------------------------------------------------------------------------------


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def proj(projector: Projector, h: list[float]) -> list[float]:
    """Proj of PPlug eq. 4: two layers with GELU between."""
    inner = [
        dot(row, h) + b for row, b in zip(projector.inner.weight.tolist(), projector.inner.bias.tolist(), strict=True)
    ]
    active = [z * 0.5 * (1 + math.erf(z / math.sqrt(2))) for z in inner]
    return [
        dot(row, active) + b
        for row, b in zip(projector.outer.weight.tolist(), projector.outer.bias.tolist(), strict=True)
    ]


def paper_weights(
    x: list[float] | None, history: list[list[float]], temperature: float, slope: float = 0.0
) -> list[float]:
    """PPlug eq. 3, or equal weights without a request, and our recency: the last of n behaviors is the newest."""
    n = len(history)
    scores = [0.0 if x is None else temperature * dot(x, h) for h in history]
    powers = [math.exp(score) / (n - i) ** slope for i, score in enumerate(scores)]
    return [power / sum(powers) for power in powers]


def paper_soft_tokens(plug: Plug, x: list[float] | None, history: list[list[float]]) -> list[list[float]]:
    """[I; P] of PPlug eq. 5 for one request, with eq. 4 applied to each behavior."""
    options = plug.options
    temperature = math.exp(plug.log_temperature.item()) if options.learn_temperature else options.temperature
    history = history or [plug.typical_behavior.tolist()]
    slope = plug.recency_slope.item() if options.recency else 0.0
    weights = paper_weights(x, history, temperature, slope)
    projected = [proj(plug.projector, h) for h in history]
    P = [sum(w * p[i] for w, p in zip(weights, projected, strict=True)) for i in range(len(projected[0]))]
    # Ours: scale the deviation of P from the persona of the typical behavior.
    typical = proj(plug.projector, plug.typical_behavior.tolist())
    P = [at + options.persona_gain * (p - at) for p, at in zip(P, typical, strict=True)]
    personas = [P[k * D_LLM : (k + 1) * D_LLM] for k in range(plug.options.persona_tokens)]
    instruction = []
    if plug.options.instruction == "vector":
        instruction = plug.instruction.tolist()
    elif plug.options.instruction == "projected":
        instruction = [proj(plug.instruction_projector, plug.instruction[0].tolist())]
    return [[plug.scale * value for value in token] for token in [*instruction, *personas]]


# A model of the frozen LLM in eq. 6: four words, and logits that are a fixed function of the soft tokens.
WORDS = [[0.7, -0.2, 0.1], [-0.4, 0.9, 0.3], [0.2, 0.5, -0.8], [1.1, -0.6, 0.4]]


def paper_loss(
    plug: Plug, queries: list[list[float]] | None, histories: list[list[list[float]]], targets: list[int]
) -> float:
    """PPlug eq. 6: minus the log-likelihood of the targets, over all requests."""
    total = 0.0
    for i, (history, word) in enumerate(zip(histories, targets, strict=True)):
        soft = paper_soft_tokens(plug, None if queries is None else queries[i], history)
        logits = [sum(math.tanh(dot(row, [*token, s])) for s, token in enumerate(soft)) for row in WORDS]
        total -= logits[word] - math.log(sum(math.exp(z) for z in logits))
    return total


def torch_loss(soft_BSD: torch.Tensor, targets: list[int]) -> torch.Tensor:
    position_BS1 = torch.arange(soft_BSD.shape[1], dtype=soft_BSD.dtype).expand(soft_BSD.shape[:2]).unsqueeze(-1)
    logits = torch.tanh(torch.cat([soft_BSD, position_BS1], -1) @ torch.tensor(WORDS, dtype=soft_BSD.dtype).T).sum(1)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")


def soft_tokens(
    plug: Plug, history_Md: torch.Tensor, lengths_B: torch.Tensor, query_Bd: torch.Tensor | None
) -> torch.Tensor:
    """The plug's forward pass with given query vectors."""
    plug.encode_query = lambda given: given  # type: ignore[method-assign]
    return plug(history_Md, lengths_B, None if query_Bd is None else (query_Bd,))


LENGTHS = torch.tensor([3, 0, 1, 5, 0, 2])
HISTORY, QUERIES = unit(11, seed=1), unit(6, seed=2)
TARGETS = [0, 3, 1, 2, 2, 0]
VARIANTS = [
    {},
    {"learn_temperature": True},
    {"recency": True},
    {"weights": "mean"},
    {"weights": "mean", "recency": True},
    {"persona_gain": 4.0},
    {"persona_gain": 0.5, "weights": "mean"},
    {"instruction": "none", "persona_tokens": 1},
    {"instruction": "projected"},
]


def split(history_Md: torch.Tensor, lengths_B: torch.Tensor) -> list[list[list[float]]]:
    return [part.tolist() for part in history_Md.split(lengths_B.tolist())]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_soft_tokens_and_loss_follow_the_equations(options):
    plug = new_plug(**options)
    query_Bd = None if plug.options.weights == "mean" else QUERIES
    soft_BSD = soft_tokens(plug, HISTORY, LENGTHS, query_Bd)
    histories = split(HISTORY, LENGTHS)
    queries = None if query_Bd is None else query_Bd.tolist()
    expected = [paper_soft_tokens(plug, None if queries is None else queries[i], h) for i, h in enumerate(histories)]
    torch.testing.assert_close(soft_BSD, torch.tensor(expected, dtype=torch.float64), **EXACT)
    loss = torch_loss(soft_BSD, TARGETS)
    assert loss.item() == pytest.approx(paper_loss(plug, queries, histories, TARGETS), rel=1e-12)


def test_weights_follow_equation_3():
    plug = new_plug(learn_temperature=True)
    weights_M = plug.weigh(HISTORY, LENGTHS, QUERIES)
    expected = [
        weight
        for x, history in zip(QUERIES.tolist(), split(HISTORY, LENGTHS), strict=True)
        for weight in paper_weights(x, history, plug.temperature().item())
    ]
    torch.testing.assert_close(weights_M, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_recency_starts_without_effect_and_then_prefers_newer_behaviors():
    plain, plug = new_plug(), new_plug(recency=True)
    plug.recency_slope.data.fill_(0.0)
    assert torch.equal(plug.weigh(HISTORY, LENGTHS, QUERIES), plain.weigh(HISTORY, LENGTHS, QUERIES))
    plug.recency_slope.data.fill_(1.0)
    same_Md = HISTORY[:1].expand(11, -1)
    # Equal behaviors, and no request.
    for weights_M in (plug.weigh(same_Md, LENGTHS, QUERIES), plug.weigh(HISTORY, LENGTHS, None)):
        for weights in weights_M.split(LENGTHS.tolist()):
            n = len(weights)
            total = sum(1 / k for k in range(1, n + 1))
            assert weights.tolist() == pytest.approx([1 / (n - i) / total for i in range(n)], rel=1e-12)


def test_uniform_weights_ignore_what_was_learned():
    plain, plug = new_plug(), new_plug(recency=True)
    for query_Bd in (QUERIES, None):
        weights_M = plug.weigh(HISTORY, LENGTHS, query_Bd, uniform_weights=True)
        assert torch.equal(weights_M, plain.weigh(HISTORY, LENGTHS, None))


def numbers(parameter: torch.Tensor) -> Iterator[Callable[[float], None]]:
    """For each number of a parameter, a function that adds to it."""
    flat = parameter.detach().view(-1)
    for i in range(len(flat)):
        yield lambda step, i=i: flat[i].add_(step).item()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients_are_the_slopes_of_the_loss(options):
    plug = new_plug(**options)
    query_Bd = None if plug.options.weights == "mean" else QUERIES.clone().requires_grad_()
    torch_loss(soft_tokens(plug, HISTORY, LENGTHS, query_Bd), TARGETS).backward()
    queries, histories = None if query_Bd is None else QUERIES.tolist(), split(HISTORY, LENGTHS)
    # Central differences of step s have truncation errors of about s² and rounding errors of 2^-53 / s.
    step, tolerance = 1e-5, {"rtol": 1e-6, "atol": 1e-8}
    for name, parameter in plug.named_parameters():
        slopes = []
        for nudge in numbers(parameter):
            losses = []
            for by in (step, -2 * step):
                nudge(by)
                losses.append(paper_loss(plug, queries, histories, TARGETS))
            nudge(step)
            slopes.append((losses[0] - losses[1]) / (2 * step))
        expected = torch.tensor(slopes, dtype=torch.float64).view_as(parameter)
        torch.testing.assert_close(parameter.grad, expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    if query_Bd is not None:  # the gradient that trains the query encoder of eq. 2
        for i in range(len(LENGTHS)):
            for j in range(D_ENCODER):
                losses = []
                for by in (step, -step):
                    moved = [list(x) for x in queries]
                    moved[i][j] += by
                    losses.append(paper_loss(plug, moved, histories, TARGETS))
                slope = (losses[0] - losses[1]) / (2 * step)
                assert float(query_Bd.grad[i, j]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_mixing_before_the_last_layer_equals_mixing_after_it():
    plug = new_plug(persona_tokens=3)
    weights_M = plug.weigh(HISTORY, LENGTHS, QUERIES)
    long_M = plug.scale * weights_M.unsqueeze(-1) * plug.projector(HISTORY)
    for i, (rows, personas_KD) in enumerate(
        zip(long_M.split(LENGTHS.tolist()), plug.persona(HISTORY, LENGTHS, weights_M), strict=True)
    ):
        if LENGTHS[i]:
            torch.testing.assert_close(personas_KD.flatten(), rows.sum(0), **EXACT)


def test_one_behavior_has_all_the_weight():
    plug = new_plug()
    weights_M = plug.weigh(HISTORY[:1], torch.tensor([1]), QUERIES[:1])
    assert weights_M.tolist() == [1.0]
    persona_1KD = plug.persona(HISTORY[:1], torch.tensor([1]), weights_M)
    torch.testing.assert_close(persona_1KD.flatten(), plug.scale * plug.projector(HISTORY[0]), **EXACT)


def test_an_empty_history_gets_the_persona_of_the_typical_behavior_and_trains_the_projector():
    plug = new_plug()
    seen_Nd = unit(5, seed=8)
    plug.set_typical_behavior(seen_Nd)
    soft_BSD = soft_tokens(plug, HISTORY[:0], torch.tensor([0, 0]), QUERIES[:2])
    typical_1SD = soft_tokens(plug, seen_Nd.mean(0, keepdim=True), torch.tensor([1]), QUERIES[:1])
    torch.testing.assert_close(soft_BSD, typical_1SD.expand(2, -1, -1), **EXACT)
    soft_BSD.square().sum().backward()
    assert all(parameter.grad.any() for parameter in plug.projector.parameters())


def test_the_typical_behavior_affects_only_empty_histories():
    plug = new_plug()
    before = soft_tokens(plug, HISTORY, LENGTHS, QUERIES)
    plug.set_typical_behavior(unit(4, seed=10))
    after = soft_tokens(plug, HISTORY, LENGTHS, QUERIES)
    assert torch.equal(before[LENGTHS > 0], after[LENGTHS > 0])
    assert not torch.isclose(before[LENGTHS == 0][:, 1:], after[LENGTHS == 0][:, 1:]).all(-1).any()


def test_a_gain_scales_the_deviation_from_the_typical_persona_and_not_empty_histories():
    plain, plug = new_plug(), new_plug(persona_gain=4.0)
    without, with_gain = (soft_tokens(one, HISTORY, LENGTHS, QUERIES)[:, 1:] for one in (plain, plug))
    typical_KD = without[LENGTHS == 0][0]
    assert torch.equal(with_gain[LENGTHS == 0], without[LENGTHS == 0])
    torch.testing.assert_close(with_gain - typical_KD, 4 * (without - typical_KD), **EXACT)


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_below_its_full_strength_a_plug_moves_each_persona_to_the_typical_one(gain):
    plug = new_plug(persona_gain=gain)
    whole = soft_tokens(plug, HISTORY, LENGTHS, QUERIES)
    plug.full_strength.fill_(0.25)
    weaker = soft_tokens(plug, HISTORY, LENGTHS, QUERIES)
    typical_SD = whole[LENGTHS == 0][0]
    torch.testing.assert_close(weaker - typical_SD, 0.25 * (whole - typical_SD), **EXACT)


def test_the_query_token_is_the_projected_query_behind_the_persona():
    plug, plain = new_plug(query_token=True), new_plug()
    for one in (plug, plain):
        one.encode_query = lambda given: given  # type: ignore[method-assign]
    found = plug(HISTORY, LENGTHS, (QUERIES,))
    torch.testing.assert_close(found[:, :-1], plain(HISTORY, LENGTHS, (QUERIES,)), **EXACT)
    expected = [[plug.scale * value for value in proj(plug.query_projector, query)] for query in QUERIES.tolist()]
    torch.testing.assert_close(found[:, -1], torch.tensor(expected, dtype=torch.float64), **EXACT)
    # The strength of the persona leaves it as it is; so do equal weights.
    for other in (
        plug(HISTORY, LENGTHS, (QUERIES,), strength=0.0),
        plug(HISTORY, LENGTHS, (QUERIES,), uniform_weights=True),
    ):
        assert torch.equal(other[:, -1], found[:, -1])
        assert not torch.equal(other[:, 1:-1], found[:, 1:-1])


def test_equal_weights_stay_equal_beside_a_query_token():
    plug, plain = new_plug(query_token=True), new_plug(weights="mean")
    mean = Plug(replace(plug.options, weights="mean"), query_encoder=FixedQueries(), width=3, llm_width=2, token_norm=1)
    torch.testing.assert_close(mean.weigh(HISTORY, LENGTHS, QUERIES), plain.weigh(HISTORY, LENGTHS, None), **EXACT)
    assert not torch.equal(plug.weigh(HISTORY, LENGTHS, QUERIES), plain.weigh(HISTORY, LENGTHS, None))


def test_setting_the_typical_behavior_from_no_behaviors_changes_nothing():
    plug = new_plug()
    before = plug.typical_behavior.clone()
    plug.set_typical_behavior(torch.zeros(0, D_ENCODER))
    assert torch.equal(plug.typical_behavior, before)


def test_512_behaviors_follow_the_equations():
    plug = new_plug()
    history_Md, lengths_B = unit(512 + 2, seed=3), torch.tensor([512, 2])
    weights_M = plug.weigh(history_Md, lengths_B, QUERIES[:2])
    assert [float(part.sum()) for part in weights_M.split([512, 2])] == pytest.approx([1.0, 1.0], rel=1e-12)
    soft_BSD = soft_tokens(plug, history_Md, lengths_B, QUERIES[:2])
    expected = paper_soft_tokens(plug, QUERIES[0].tolist(), history_Md[:512].tolist())
    torch.testing.assert_close(soft_BSD[0], torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_a_request_gets_the_same_soft_tokens_alone_and_in_any_batch():
    plug = new_plug()
    together = soft_tokens(plug, HISTORY, LENGTHS, QUERIES)
    for i, history_Md in enumerate(HISTORY.split(LENGTHS.tolist())):
        alone = soft_tokens(plug, history_Md, LENGTHS[i : i + 1], QUERIES[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], **EXACT)


def test_the_order_of_a_history_does_not_matter():
    plug = new_plug()
    forward = soft_tokens(plug, HISTORY, torch.tensor([11]), QUERIES[:1])
    backward = soft_tokens(plug, HISTORY.flip(0), torch.tensor([11]), QUERIES[:1])
    torch.testing.assert_close(forward, backward, **EXACT)


def test_mean_is_attention_with_equal_weights():
    """A query that is orthogonal to all behaviors weighs them equally."""
    plug = new_plug()
    orthogonal_Bd = torch.zeros(len(LENGTHS), D_ENCODER, dtype=torch.float64)
    torch.testing.assert_close(
        soft_tokens(plug, HISTORY, LENGTHS, orthogonal_Bd), soft_tokens(plug, HISTORY, LENGTHS, None), **EXACT
    )


def test_the_temperature_starts_at_the_given_value_and_sharpens_the_weights():
    flat, sharp = (new_plug(learn_temperature=True, temperature=value) for value in (0.5, 50.0))
    assert flat.temperature().item() == pytest.approx(0.5)
    fixed = new_plug(temperature=0.5)
    one = torch.tensor([11])
    torch.testing.assert_close(
        flat.weigh(HISTORY, one, QUERIES[:1]),
        fixed.weigh(HISTORY, one, QUERIES[:1]),
        # The logarithm of the learned temperature is rounded to float32.
        rtol=1e-6,
        atol=0,
    )
    nearest = int((HISTORY @ QUERIES[0]).argmax())
    assert int(sharp.weigh(HISTORY, one, QUERIES[:1]).argmax()) == nearest
    assert sharp.weigh(HISTORY, one, QUERIES[:1]).max() > 2 * flat.weigh(HISTORY, one, QUERIES[:1]).max()


def test_a_huge_temperature_does_not_overflow():
    plug = new_plug(temperature=1e6)
    weights_M = plug.weigh(HISTORY, LENGTHS, QUERIES)
    assert torch.isfinite(weights_M).all()
    plug.float()
    assert torch.isfinite(plug.weigh(HISTORY.float(), LENGTHS, QUERIES.float())).all()


@pytest.mark.parametrize("token_norm", [0.1, 540.0])
def test_soft_tokens_start_with_the_norm_of_the_llms_tokens(token_norm):
    torch.manual_seed(0)
    options = PlugOptions(weights="mean", persona_tokens=2, persona_gain=1.0)
    plug = Plug(options, query_encoder=None, width=32, llm_width=48, token_norm=token_norm)
    soft_BSD = plug(unit(400, seed=4, width=32).float(), torch.ones(400, dtype=torch.long), None)
    norms_S = soft_BSD.norm(dim=-1).mean(0)
    # The scale was measured on 256 other vectors, whose norms vary by a few percent.
    torch.testing.assert_close(norms_S, torch.full((3,), token_norm), rtol=0.05, atol=0)


def test_a_given_scale_is_kept():
    plug = Plug(PlugOptions(weights="mean"), query_encoder=None, width=3, llm_width=2, token_norm=1.0, scale=7.5)
    assert plug.scale == 7.5


def test_a_history_with_another_length_or_width_is_refused():
    plug = new_plug(weights="mean")
    with pytest.raises(ValueError, match=r"expected shape \(11, 3\), got \(10, 3\)"):
        plug(HISTORY[:10], LENGTHS, None)
    with pytest.raises(ValueError, match=r"expected shape \(11, 3\), got \(11, 2\)"):
        plug(HISTORY[:, :2], LENGTHS, None)


def test_attention_needs_a_query_encoder_and_mean_takes_none():
    settings = {"width": 3, "llm_width": 2, "token_norm": 1.0}
    with pytest.raises(UsageError, match="a plug with attention weights needs a query encoder"):
        Plug(PlugOptions(weights="attention"), query_encoder=None, **settings)
    with pytest.raises(UsageError, match="a plug with mean weights takes no query encoder"):
        Plug(PlugOptions(weights="mean"), query_encoder=FixedQueries(), **settings)
    with pytest.raises(UsageError, match="a plug with mean weights has no query encoder"):
        new_plug(weights="mean").encode_query(torch.ones(1, 1), torch.ones(1, 1))


def test_the_number_of_trained_parameters_is_that_of_the_reference_implementation():
    """BGE-base and FlanT5-XXL: 149,345,280, without BERT's pooler (590,592), which never gets a gradient there."""
    with torch.device("meta"):
        query_encoder = AutoModel.from_config(BertConfig(), add_pooling_layer=False)
        plug = Plug(
            PlugOptions(weights="attention", persona_tokens=1, instruction="projected"),
            query_encoder=query_encoder,
            query_head=SentenceHead("cls"),
            width=768,
            llm_width=4096,
            token_norm=1.0,
            scale=1.0,
        )
    assert sum(parameter.numel() for parameter in plug.parameters()) == 149_345_280 - 590_592 == 148_754_688
