"""Recipes are configurations that their jobs accept, and the paper's is the paper's."""

from pathlib import Path

import pytest

from jobs import train
from jobs.command import read_config

RECIPES = sorted((Path(train.__file__).parent / "recipes").glob("*.yaml"))
PLACES = ["--requests", "a", "--store", "b", "--plug", "c", "--run", "d", "--runs", "e"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_accepted(recipe: Path) -> None:
    assert read_config(train.Config, ["--config", str(recipe), *PLACES])


def test_the_paper_has_no_temperature_one_token_and_its_reference_passes() -> None:
    config = read_config(train.Config, ["--config", str(RECIPES[-1].with_name("paper.yaml")), *PLACES])
    assert config is not None
    assert (config.weights, config.persona_tokens, config.temperature, config.learn_temperature) == (
        "attention",
        1,
        1.0,
        False,
    )
    # Two epochs over data written eleven times, 64 requests a step.
    assert (config.epochs, config.global_batch, config.empty_history) == (2 * 11, 64, 0.0)
