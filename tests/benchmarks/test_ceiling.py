"""The plug of keys and values, its training without Ray, and the tables of the comparison."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds
from persona.models.resolve import resolve
from persona.options import TrainingOptions
from persona.plug.personalized import Batch, PersonalizedLLM
from persona.store import vectors
from tests.benchmarks import ceiling, ceiling_data, ceiling_table, prefix_plug
from tests.benchmarks.prefix_plug import PrefixLLM, PrefixPlug
from tests.models import ENCODER_WIDTH, tiny_encoder, tiny_llama
from tests.plugs import ROWS, new_model, random_history

# Of float32 through two layers: what another order of the same sums changes.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def model(tmp_path: Path) -> PersonalizedLLM:
    """A plug with a gain and equal weights in front of a tiny Llama."""
    encoder = resolve(str(tiny_encoder(tmp_path / "encoder")), flag="--encoder")
    llm = FrozenLLM.load(resolve(str(tiny_llama(tmp_path / "llm")), flag="--llm"), precision="fp32", device="cpu")
    return new_model(encoder, llm, weights="mean", persona_tokens=3, persona_gain=4.0)


@pytest.fixture
def behaviors() -> torch.Tensor:
    history = random_history(np.random.default_rng(0), 40, ENCODER_WIDTH)
    return torch.from_numpy(vectors.from_bytes(history, ENCODER_WIDTH).astype(np.float32))


def in_front(batch: Batch) -> list[PromptIds]:
    """The prompts with the soft tokens in front of all text."""
    return [PromptIds(before=(), after=(*prompt.before, *prompt.after)) for prompt in batch.prompts]


def test_keys_and_values_of_soft_tokens_give_the_same_loss_and_gradient_as_the_soft_tokens(model: PersonalizedLLM):
    batch = model.collate(ROWS)
    soft_BSD = model.soft_tokens(batch).detach().requires_grad_()
    losses, gradients = [], []
    for nll in (
        model.llm.nll(soft_BSD, in_front(batch), batch.targets),
        prefix_plug.nll(model.llm, prefix_plug.read(model.llm, soft_BSD), in_front(batch), batch.targets),
    ):
        losses.append(nll.detach())
        gradients += torch.autograd.grad(nll.sum(), soft_BSD)
    assert len(set(losses[0].tolist())) == len(ROWS)
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


def test_without_a_history_a_new_plug_of_keys_and_values_has_the_loss_of_its_soft_tokens(
    model: PersonalizedLLM, behaviors: torch.Tensor
):
    rows = [{**row, "history": b""} for row in ROWS]
    batch = model.collate(rows)
    expected = model.llm.nll(model.soft_tokens(batch), in_front(batch), batch.targets)
    prefix = PrefixLLM.from_soft_tokens(model, behaviors, rank=4)
    torch.testing.assert_close(prefix(prefix.collate(rows)), expected, **CLOSE)
    assert (prefix(prefix.collate(ROWS)) - expected).abs().max() > 0.01


def test_the_codes_start_as_the_best_map_of_their_rank(model: PersonalizedLLM, behaviors: torch.Tensor):
    rank, n = 5, len(behaviors)
    one_N = torch.ones(n, dtype=torch.long)
    prefix = PrefixLLM.from_soft_tokens(model, behaviors, rank=rank).plug
    assert isinstance(prefix, PrefixPlug)
    with torch.no_grad():
        y_NC = (prefix_plug.read(model.llm, model.plug(behaviors, one_N, None)) / prefix.unit).flatten(1).double()
        x_NF = prefix.deviations(behaviors, one_N).double()
        got_NC = (x_NF - x_NF.mean(0)) @ prefix.down.double() @ prefix.up.double()
        code_NR = x_NF @ prefix.down.double()
    x_NF, y_NC = x_NF - x_NF.mean(0), y_NC - y_NC.mean(0)
    penalty = prefix_plug._RIDGE * (x_NF**2).sum(0).mean()
    fitted_NC = x_NF @ torch.linalg.solve(x_NF.T @ x_NF + penalty * torch.eye(x_NF.shape[1]), x_NF.T @ y_NC)
    left, size, right = torch.linalg.svd(fitted_NC, full_matrices=False)
    best_NC = left[:, :rank] * size[:rank] @ right[:rank]
    torch.testing.assert_close(got_NC, best_NC, **CLOSE)
    torch.testing.assert_close(code_NR.var(0, correction=0), torch.ones(rank).double(), **CLOSE)


def text_encoder(folder: Path) -> TextEncoder:
    """The encoder that `model` has written."""
    found = resolve(str(folder), flag="--encoder")
    return TextEncoder(found, pooling="mean", max_tokens=64, precision="fp32", device="cpu")


@pytest.mark.parametrize("empty_history", [0.0, 1.0])
def test_training_lowers_the_loss_and_without_histories_leaves_the_codes_alone(
    model: PersonalizedLLM, behaviors: torch.Tensor, tmp_path: Path, empty_history: float
):
    rows = [{**row, "request_id": f"{row['request_id']}-{i}"} for i in range(8) for row in ROWS]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    requests = pa.table({**columns, "history": pa.array(columns["history"], pa.large_binary())})
    options = TrainingOptions(
        global_batch=4, micro_batch=4, learning_rate=3e-2, empty_history=empty_history, alignment=0.0, weight_decay=0.0
    )
    prefix = PrefixLLM.from_soft_tokens(model, behaviors, rank=4)
    up, shared = prefix.plug.up.clone(), prefix.plug.shared.clone()
    encoder = text_encoder(tmp_path / "encoder")
    losses = ceiling.train(prefix, requests, options, encoder)
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.4
    assert not torch.equal(prefix.plug.shared, shared)
    assert torch.equal(prefix.plug.up, up) == (empty_history == 1)


def test_near_titles_are_as_far_from_the_typical_behavior_as_histories_and_in_the_direction_of_titles(
    model: PersonalizedLLM, behaviors: torch.Tensor, tmp_path: Path
):
    encoder = text_encoder(tmp_path / "encoder")
    rows = [row for row in ROWS if row["history"]]
    histories = pa.array([row["history"] for row in rows], pa.large_binary())
    table = pa.table({"target": [row["target"] for row in rows], "history": histories})
    typical = behaviors.numpy()
    from_center = []
    for column in (*ceiling_data.title_vectors(table, encoder, typical), histories):
        means = [vectors.from_bytes(one, ENCODER_WIDTH).astype(np.float32).mean(0) for one in column.to_pylist()]
        from_center.append(np.stack(means) - typical.mean(0))
    titles_Rd, near_Rd, means_Rd = from_center
    size_R, near_size_R = (np.linalg.norm(one, axis=1) for one in (titles_Rd, near_Rd))
    # Stored as float16.
    assert near_size_R.mean() == pytest.approx(np.linalg.norm(means_Rd, axis=1).mean(), rel=1e-3)
    np.testing.assert_allclose(near_Rd / near_size_R[:, None], titles_Rd / size_R[:, None], atol=2e-3)


def record(plug: str, own: list[float], other: list[float]) -> dict[str, Any]:
    losses = {"user_id": ["a", "a", "b"], "tokens": [2, 2, 4], "own": own, "other": other}
    return {"plug": plug, "width": 8, "losses": losses}


def test_differences_are_per_token_and_multiples_are_of_sums(capsys: pytest.CaptureFixture[str]):
    tokens, prefix = (
        record("tokens", [2.0, 2.0, 4.0], [3.0, 3.0, 6.0]),
        record("prefix", [2.0, 2.0, 3.0], [4.0, 4.0, 7.0]),
    )
    assert ceiling_table.minus((prefix, "own"), (tokens, "own")).mean == pytest.approx(-1 / 8)
    found = ceiling_table.times(prefix, tokens)
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)
    ceiling_table.show([tokens, prefix])
    assert "| prefix, vectors 8 wide | −1.000 [−1.000, −1.000] | 2.00 [2.00, 2.00] |" in capsys.readouterr().out


def test_the_input_of_an_abstract_request_is_the_abstract_of_that_paper(tmp_path: Path):
    papers = [("u", "One", "One of u."), ("u", "One and two", "Both of u."), ("v", "One", "One of v.")]
    rows = {"request_id": ["a", "b", "c"], "user_id": [user for user, _, _ in papers]}
    table = pa.table({**rows, "input": ["?"] * 3, "target": [title for _, title, _ in papers]})
    which = pa.table({"input": ['[1]: "x" [2]: "y"'] * 3, "target": ["[1]"] * 3})
    histories = {"user_id": rows["user_id"], "text": [f"{title} {abstract}" for _, title, abstract in papers]}
    pq.write_table(pa.table(histories), tmp_path / "histories.parquet")
    for split in ("train", "dev"):
        pq.write_table(table, tmp_path / f"next_title_{split}.parquet")
        pq.write_table(which, tmp_path / f"which_{split}.parquet")
    for part in ceiling_data.requests(tmp_path, task="abstract", train_rows=3, split="dev", every=1):
        assert [one.split("\n")[1] for one in part["input"].to_pylist()] == ["One of u.", "Both of u.", "One of v."]
        assert part["target"] == table["target"]
