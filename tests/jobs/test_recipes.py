"""Recipes: every job accepts its section, `paper` has the settings of PPlug, and a name finds its file.

Recipes of a task are in the folder of the task; those by data size are for any task.
"""

from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig

from jobs import embed, evaluate, generate, import_lamp, import_longlamp, pair, style, train
from jobs.runtime import catalog
from jobs.runtime.configuration import read_config
from jobs.runtime.job_options import flat_settings
from persona.errors import UsageError
from persona.evaluation.benchmark_verdict import FEW_STEPS
from persona.inputs import longlamp
from persona.inputs.lamp import TASKS
from persona.models.resolve import ModelFolder
from persona.options import PlugOptions, TrainingOptions
from persona.plug import folder as plug_folder
from persona.plug.module import Plug

FOLDER = Path(train.__file__).parent / "recipes"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))
SIZES = {size: FOLDER / f"{size}.yaml" for size in ("small", "base", "large")}
PLACES = {
    import_lamp: ["--questions", "q", "--out", "o"],
    import_longlamp: ["--questions", "q", "--split", "val", "--out", "o"],
    embed: ["--histories", "h", "--store", "s"],
    train: ["--requests", "r", "--store", "s", "--plug", "p", "--run", "n", "--runs", "k"],
    generate: ["--requests", "r", "--store", "s", "--plug", "p"],
    evaluate: ["--requests", "r", "--store", "s", "--plug", "p", "--out", "o"],
    style: ["--requests", "r", "--styles", "i", "--out", "o"],
    pair: ["--requests", "r", "--store", "s", "--out", "o"],
}
OF_STYLE = "acl_style/preference"


# Stated by every recipe `paper`, so that no default is part of it. The seed belongs to a run.
SETTINGS = {one.name for kind in (PlugOptions, TrainingOptions) for one in fields(kind)} - {"seed"}


def name(recipe: Path) -> str:
    return f"{recipe.parent.name}/{recipe.stem}"


def read(job: ModuleType, recipe: Path, *flags: str) -> Any:
    reference = ["--reference", "f"] if (job, name(recipe)) == (train, OF_STYLE) else []
    return read_config(job.Config, ["--config", str(recipe), *PLACES[job], *reference, *flags])


def test_every_task_and_the_acl_set_have_both_recipes() -> None:
    folders = [f"lamp_{task.removeprefix('LaMP_')}" for task in TASKS] + ["acl_next_title", "acl_which"]
    folders += [f"longlamp_{task}" for task in longlamp.TASKS]
    assert {name(recipe) for recipe in RECIPES} == {
        *(f"acl_style/{how}" for how in ("nll", "preference")),
        *(f"{folder}/{how}" for folder in folders for how in ("paper", "best")),
    }


@pytest.mark.parametrize("recipe", [one for one in RECIPES if one.stem == "paper"], ids=name)
def test_a_recipe_of_the_paper_states_every_setting(recipe: Path) -> None:
    written = yaml.safe_load(recipe.read_text())["train"]
    lengths = {f"max_{one}" for one in ("query_tokens", "input_tokens", "target_tokens", "behaviors")}
    assert {*SETTINGS, *lengths, "llm", "query_prompt", "select", "patience", "validation_fraction"} <= written.keys()


def test_a_plain_training_is_that_of_the_recipe_base() -> None:
    assert read(train, SIZES["base"]) == read_config(train.Config, PLACES[train])


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_by_size_is_for_any_task_and_differs_in_passes_batch_and_rate(size: str) -> None:
    written = yaml.safe_load(SIZES[size].read_text())
    assert written.keys() == {"embed", "train", "generate", "evaluate"}
    of_a_task = {"llm", "encoder", "prompt_format", "metric", "task", "query_prompt", "max_input_tokens"}
    assert not of_a_task & {key for section in written.values() for key in section}
    for job in (embed, train, generate, evaluate):
        assert read_config(job.Config, ["--config", size, *PLACES[job]]) is not None
    found, base = read(train, SIZES[size]), read(train, SIZES["base"])
    assert found.plug_options == base.plug_options
    own = ("epochs", "global_batch", "learning_rate")
    assert replace(found.training, **{one: getattr(base.training, one) for one in own}) == base.training
    fewest = {"small": 500, "base": 6_000, "large": 100_000}[size]
    assert f"{fewest:,}" in SIZES[size].read_text()
    assert found.training.n_steps(fewest) >= FEW_STEPS
    found.training.check_workers(8)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
@pytest.mark.parametrize("job", PLACES, ids=lambda job: job.__name__.removeprefix("jobs."))
def test_every_job_accepts_its_section_of_every_recipe(job: ModuleType, recipe: Path) -> None:
    section = job.__name__.removeprefix("jobs.")
    written = yaml.safe_load(recipe.read_text())
    if section not in written:
        importers = {"import_lamp": "lamp_", "import_longlamp": "longlamp_"}
        assert section in ("style", "pair") or not recipe.parent.name.startswith(importers[section])
        return
    settings = flat_settings(read(job, recipe))
    for key, value in written[section].items():
        assert settings[key] == (tuple(value) if isinstance(value, list) else value)


def test_the_recipes_for_styles_are_that_of_titles_and_differ_in_the_preference_alone() -> None:
    titles, nll, styles = (
        read(train, FOLDER / f"{one}.yaml") for one in ("acl_next_title/best", "acl_style/nll", OF_STYLE)
    )
    assert nll.plug_options == titles.plug_options
    assert nll.training == titles.training
    assert replace(styles.training, preference=0.0, nll_weight=1.0) == nll.training
    assert replace(styles, training=nll.training, preferences=nll.preferences) == nll


@pytest.mark.parametrize("task", TASKS)
def test_paper_has_the_settings_of_the_paper(task: str) -> None:
    recipe = FOLDER / f"lamp_{task.removeprefix('LaMP_')}" / "paper.yaml"
    config = read(train, recipe)
    assert config.llm == "google/flan-t5-xxl"
    plug, training = config.plug_options, config.training
    assert (plug.weights, plug.persona_tokens, plug.instruction, training.warm_start) == (
        "attention",
        1,
        "projected",
        "none",
    )
    assert (plug.temperature, plug.learn_temperature, plug.recency) == (1.0, False, False)
    assert (plug.persona_gain, training.alignment, training.contrast) == (1.0, 0.0, 0.0)
    # The paper repeats its data eleven times and trains one epoch for LaMP-3, two for the others.
    assert training.epochs == 11 * (1 if task == "LaMP_3" else 2)
    assert (training.history_dropout, training.empty_history) == (0.5, 0.0)
    assert (training.global_batch, training.zero_stage, config.precision) == (64, 1, "bf16")
    assert (training.learning_rate, training.query_learning_rate, training.weight_decay) == (1e-4, 1e-4, 1e-4)
    assert (training.warmup, config.max_behaviors) == (0.05, 512)
    assert (config.max_input_tokens, config.max_query_tokens) == (256, 276)
    assert config.max_target_tokens == TASKS[task].max_new_tokens
    assert (config.select, training.max_gradient_norm) == ("last", 0)
    assert config.query_prompt == "Represent this sentence for searching relevant passages: "
    encoder = read(embed, recipe)
    assert (encoder.encoder, encoder.vectors.pooling, encoder.max_tokens) == ("BAAI/bge-base-en-v1.5", "cls", 512)
    answers = read(generate, recipe).decoding
    assert (answers.beams, answers.sample, answers.max_new_tokens) == (4, False, TASKS[task].max_new_tokens)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_names_one_task_and_scores_what_it_generates(recipe: Path) -> None:
    answers, scores = read(generate, recipe), read(evaluate, recipe)
    assert answers.persona == scores.scored == scores.persona == ("own", "none", "other", "mean")
    if recipe.parent.name.startswith("lamp"):
        task = f"LaMP_{recipe.parent.name[-1]}"
        assert (read(import_lamp, recipe).task, scores.task) == (task, task)
    if recipe.parent.name.startswith("longlamp"):
        assert read(import_longlamp, recipe).task == recipe.parent.name.removeprefix("longlamp_")
        assert (scores.metric, answers.decoding.max_new_tokens) == ("long_text", read(train, recipe).max_target_tokens)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_the_scored_set_never_chooses_the_step(recipe: Path) -> None:
    """LaMP is scored on dev, and the paper's recipes are for comparisons: their held-out users are of train."""
    if recipe.parent.name.startswith("lamp") or recipe.stem == "paper":
        assert read(train, recipe).validation is None
        assert "--validation" not in recipe.read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_states_how_many_parameters_it_trains(recipe: Path, tmp_path: Path) -> None:
    config = read(train, recipe)
    assert read(embed, recipe).encoder == "BAAI/bge-base-en-v1.5"
    BertConfig().save_pretrained(tmp_path)  # the size of the recipes' encoder
    encoder = ModelFolder(name="", revision="", path=tmp_path, fingerprint="")
    with torch.device("meta"):
        query_encoder, query_head = plug_folder.new_query_encoder(
            encoder, config.plug_options, pooling="cls", width=768, pretrained=False
        )
        plug = Plug(
            config.plug_options,
            query_encoder=query_encoder,
            query_head=query_head,
            width=768,
            llm_width={"google/flan-t5-xxl": 4096, "HuggingFaceTB/SmolLM2-135M": 576}[
                config.llm.removesuffix("-Instruct")
            ],
            token_norm=1.0,
            scale=1.0,
        )
    n_trained = sum(parameter.numel() for parameter in plug.parameters())
    assert recipe.read_text().splitlines()[1] == f"# Trained parameters: {n_trained:,}."
    if recipe.parent.name.startswith("lamp") and recipe.stem == "paper":
        vector = n_trained - sum(p.numel() for p in plug.instruction_projector.parameters()) - 768 + 4096
        assert f"{(n_trained - vector) / 1e6:.1f} M fewer parameters" in recipe.read_text()


def test_a_flag_wins_over_the_recipe() -> None:
    config = read(train, FOLDER / "lamp_4" / "paper.yaml", "--llm", "google/flan-t5-xl", "--no-learn-temperature")
    assert (config.llm, config.training.global_batch) == ("google/flan-t5-xl", 64)


def test_a_recipe_is_found_by_its_name() -> None:
    assert catalog.recipe_names() == sorted([*map(name, RECIPES), *SIZES])
    by_name = read_config(train.Config, ["--config", "lamp_4/best", *PLACES[train]])
    assert by_name == read(train, FOLDER / "lamp_4" / "best.yaml")


def test_an_unknown_recipe_lists_those_that_exist() -> None:
    with pytest.raises(UsageError) as refused:
        read_config(train.Config, ["--config", "lamp_4/bets", *PLACES[train]])
    said = str(refused.value)
    assert said.startswith("--config lamp_4/bets: is neither a file nor a recipe; did you mean lamp_4/best?")
    assert all(recipe in said for recipe in catalog.recipe_names())


def test_a_file_wins_over_a_recipe_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lamp_4").mkdir()
    (tmp_path / "lamp_4" / "best").write_text("train: {epochs: 99}")
    monkeypatch.chdir(tmp_path)
    assert read_config(train.Config, ["--config", "lamp_4/best", *PLACES[train]]).training.epochs == 99


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embed: {pooling: cls}", "has no section train, only embed"),
        ("train: {epochs: 1}\ntrian: {}", "unknown section trian; did you mean train?"),
        ("train: {epochs: 1}\nepochs: 3", "unknown section epochs"),
        ("train: {epochs: 1}\ntrain: {epochs: 2}", "duplicate section train"),
        ("train: {epochs: 1}\nstore: s", "the section store must be a mapping of keys to values"),
        ("train: {epoch: 1}", "train: unknown key epoch; did you mean epochs?"),
        ("train: {epochs: 1, epochs: 2}", "train: duplicate key epochs"),
    ],
)
def test_an_error_in_a_recipe_names_its_section(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError) as refused:
        read(train, recipe)
    assert str(refused.value).startswith(f"--config {recipe}: {message}")
