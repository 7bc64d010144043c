"""Persona embeddings of whole histories, without a request, query encoder or LLM."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.plug.user_personas import UserPersonas
from tests.models import ENCODER_WIDTH
from tests.plugs import ROWS, new_model, save

ROW_BYTES = 2 * ENCODER_WIDTH


def histories() -> pa.Table:
    """The behaviors of the users of ROWS, sorted as by the store."""
    parts = [(row["user_id"], row["history"]) for row in ROWS]
    rows = [(user, part[at : at + ROW_BYTES]) for user, part in parts for at in range(0, len(part), ROW_BYTES)]
    return pa.table({"user_id": [user for user, _ in rows], "vector": pa.array([v for _, v in rows], pa.binary())})


def made(folder: Path) -> list[dict[str, Any]]:
    names = [row["user_id"] for row in ROWS]
    users = pa.table({"bucket": [0] * len(names), "user_id": names, "change": ["new"] * len(names)})
    return UserPersonas.load(folder).make(users, histories()).to_pylist()


@pytest.mark.parametrize("recency", [False, True])
@pytest.mark.parametrize("options", [{"weights": "mean"}, {"learn_temperature": True, "persona_gain": 4.0}], ids=str)
def test_a_persona_equals_the_soft_tokens_without_a_request(
    encoder_folder: ModelFolder,
    llm_folder: ModelFolder,
    llm: FrozenLLM,
    tmp_path: Path,
    options: dict[str, Any],
    recency: bool,
) -> None:
    model = new_model(encoder_folder, llm, **options, recency=recency)
    save(tmp_path, model, encoder_folder, llm_folder)
    batch = model.collate(ROWS)
    with torch.no_grad():
        personas_BKD = model.plug(batch.history_Md, batch.lengths_B, None)[:, 1:]
        if model.plug.options.weights == "mean":  # answers then use the same soft tokens
            assert torch.equal(model.soft_tokens(batch)[:, 1:], personas_BKD)
    for row, found, expected_KD in zip(ROWS, made(tmp_path), personas_BKD, strict=True):
        assert found["user_id"] == row["user_id"]
        assert found["n_behaviors"] == len(row["history"]) // ROW_BYTES
        if not row["history"]:
            assert found["persona"] is None
        else:
            np.testing.assert_allclose(found["persona"], expected_KD.flatten().numpy(), rtol=1e-5, atol=1e-6)


def test_recency_changes_the_personas(
    encoder_folder: ModelFolder, llm_folder: ModelFolder, llm: FrozenLLM, tmp_path: Path
) -> None:
    uniform, recent = (new_model(encoder_folder, llm, weights="mean", recency=recency) for recency in (False, True))
    several = [i for i, row in enumerate(ROWS) if len(row["history"]) > ROW_BYTES]
    before = made(save(tmp_path / "uniform", uniform, encoder_folder, llm_folder))
    after = made(save(tmp_path / "recent", recent, encoder_folder, llm_folder))
    assert several and all(not np.allclose(before[i]["persona"], after[i]["persona"]) for i in several)
