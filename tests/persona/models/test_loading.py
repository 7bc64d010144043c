"""Loading models: whole and without code from the folder, or refused with the names of what is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPTNeoConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    T5Config,
)

from persona.errors import InputError
from persona.models import loading
from persona.models.resolve import ModelFolder, resolve

Weights = dict[str, Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def saved(model: PreTrainedModel, folder: Path, *, shards: int = 1) -> ModelFolder:
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards)
    return resolve(str(folder), flag="--llm")


def changed(folder: ModelFolder, to: Path, change: Callable[[Weights], Weights]) -> ModelFolder:
    """A copy of the folder with other weights."""
    shutil.copytree(folder.path, to)
    save_file(change(load_file(to / "model.safetensors")), to / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(to), flag="--llm")


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {re.sub(old, new, name): value for name, value in weights.items()}


def with_extra(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: torch.ones(3)}


def check_and_load(auto_class: Any, folder: ModelFolder) -> PreTrainedModel:
    """The model, after both the check without weights and loading."""
    loading.check_weights(folder, auto_class)
    return loading.load_model(auto_class, folder, dtype=torch.float32)


def refusals(auto_class: Any, folder: ModelFolder) -> str:
    """The message of the check without weights, which loading must repeat."""
    with pytest.raises(InputError) as checked:
        loading.check_weights(folder, auto_class)
    with pytest.raises(InputError) as loaded:
        loading.load_model(auto_class, folder, dtype=torch.float32)
    assert str(checked.value) == str(loaded.value)
    return str(checked.value)


def test_an_encoder_is_loaded_as_transformers_loads_it(encoder_folder):
    mine = check_and_load(AutoModel, encoder_folder)
    plain = AutoModel.from_pretrained(encoder_folder.path)
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("layer.1."), r"16 missing \(encoder\.layer\.1\.attention\.output\.LayerNorm\.bias, .*, …\)"),
        (renamed("^", "module."), r"\d\d missing \(.*\); \d\d unknown \(module\.embeddings\."),
        (renamed("intermediate.dense", "mlp.gated_layers"), r"4 missing \(.*intermediate\.dense\.bias"),
        (with_extra("encoder.layer.0.gate.weight"), r": 1 unknown \(encoder\.layer\.0\.gate\.weight\)"),
        (with_extra("embeddings.LayerNorm.bias"), r": 1 of another shape \(.*LayerNorm\.bias \(3 instead of 32\)"),
    ],
    ids=["a layer left out", "saved by DDP", "other names", "a part that is not used", "another shape"],
)
def test_an_encoder_that_would_be_half_read_is_refused(encoder_folder, tmp_path, change, reason):
    folder = changed(encoder_folder, tmp_path / "broken", change)
    with pytest.raises(
        InputError, match=f"the weights of '.*/broken' are not those of a BertModel .*{reason}.*copy the"
    ):
        check_and_load(AutoModel, folder)


def test_an_encoder_without_its_pooler_is_whole(encoder_folder, tmp_path):
    mine = check_and_load(AutoModel, changed(encoder_folder, tmp_path / "copy", without("pooler")))
    ids = torch.arange(5, 15)[None]
    expected = AutoModel.from_pretrained(encoder_folder.path)(ids).last_hidden_state
    assert torch.equal(mine(ids).last_hidden_state, expected)


def test_the_head_of_a_masked_language_model_is_not_needed(tmp_path):
    model = BertForMaskedLM(BertConfig(**SIZES)).eval()
    mine = check_and_load(AutoModel, saved(model, tmp_path))
    ids = torch.arange(5, 15)[None]
    assert torch.equal(mine(ids).last_hidden_state, model.bert(ids).last_hidden_state)


def test_old_names_and_masks_in_old_checkpoints_are_known(encoder_folder, tmp_path):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    folder = encoder_folder
    for new, name in old.items():
        folder = changed(folder, tmp_path / name, renamed(new, name))
    assert not {*old.values()}.isdisjoint(
        {".".join(n.split(".")[-2:]) for n in load_file(folder.path / "model.safetensors")}
    )
    mine, plain = (check_and_load(AutoModel, one).state_dict() for one in (folder, encoder_folder))
    assert all(torch.equal(mine[name], value) for name, value in plain.items())
    gpt_neo = GPTNeoConfig(vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]])
    folder = saved(AutoModelForCausalLM.from_config(gpt_neo), tmp_path / "gpt-neo")
    for name in ("attention.bias", "attention.masked_bias"):
        folder = changed(folder, tmp_path / f"gpt-neo-{name}", with_extra(f"transformer.h.0.attn.{name}"))
    check_and_load(AutoModelForCausalLM, folder)


def test_an_unused_part_inside_a_masked_language_model_is_refused(tmp_path):
    folder = saved(BertForMaskedLM(BertConfig(**SIZES)), tmp_path / "whole")
    extra = changed(folder, tmp_path / "extra", with_extra("bert.encoder.gate"))
    assert re.search(r"1 unknown \(bert\.encoder\.gate\)", refusals(AutoModel, extra))


def test_an_llm_needs_its_head_unless_it_is_tied(tmp_path):
    for tied in (False, True):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied))
        folder = changed(saved(model, tmp_path / f"{tied}"), tmp_path / f"headless-{tied}", without("lm_head"))
        if tied:
            mine = check_and_load(AutoModelForCausalLM, folder)
            assert torch.equal(mine.lm_head.weight, model.model.embed_tokens.weight)
        else:
            assert re.search(
                r"LlamaForCausalLM .*: 1 missing \(lm_head\.weight\)", refusals(AutoModelForCausalLM, folder)
            )


KINDS = {
    "t5": (AutoModelForSeq2SeqLM, T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
    "mixtral": (AutoModelForCausalLM, MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)),
    "gpt_oss": (AutoModelForCausalLM, GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_transformers_converts_and_shards_are_whole(tmp_path, kind):
    auto_class, config = KINDS[kind]
    model = auto_class.from_config(config, dtype=torch.float32)
    folder = saved(model, tmp_path, shards=3)
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    mine = check_and_load(auto_class, folder)
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_missing_expert_is_refused(tmp_path):
    auto_class, config = KINDS["mixtral"]
    folder = saved(auto_class.from_config(config), tmp_path / "whole")
    for part, reason in (("experts.2.", "3×"), ("experts.1.w2", "experts.down_proj")):
        broken = changed(folder, tmp_path / part, without(f"layers.0.block_sparse_moe.{part}"))
        assert re.search(reason, refusals(auto_class, broken))


def test_weights_larger_than_memory_are_checked(tmp_path):
    config = LlamaConfig(**{**SIZES, "vocab_size": 2**21, "hidden_size": 2**14})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, value in weights.items():
        header[name] = {"dtype": "F32", "shape": [*value.shape], "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)  # a sparse file
    assert end > 2**37
    loading.check_weights(resolve(str(tmp_path), flag="--llm"), AutoModelForCausalLM)


@pytest.fixture
def copy(encoder_folder: ModelFolder, tmp_path: Path) -> Path:
    """A copy of the encoder that a test may modify."""
    return Path(shutil.copytree(encoder_folder.path, tmp_path / "copy"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_code_in_a_folder_is_never_run(copy):
    code = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (copy / "code.py").write_text("raise SystemExit('ran')")
    edit_json(copy / "config.json", model_type="home_made", auto_map=code)
    with pytest.raises(
        InputError, match=r"model_type 'home_made': it needs Python code from its folder, which is never"
    ):
        loading.load_config(resolve(str(copy), flag="--encoder"))
    edit_json(copy / "config.json", model_type="bert")
    assert type(check_and_load(AutoModel, resolve(str(copy), flag="--encoder"))) is BertModel


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "home_made"}, r"model_type 'home_made': transformers [\d.]+ does not implement it; upgrade it"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": "wide"}, r"its config\.json is invalid .*hidden_size.*expected int, got str"),
        ({"num_attention_heads": 5}, r"it cannot be loaded \(.*not a multiple of the number of attention"),
        ({"model_type": "clip"}, "cannot be loaded|not those of"),
    ],
)
def test_a_configuration_without_a_model_is_refused(copy, values, reason):
    edit_json(copy / "config.json", **values)
    assert re.search(reason, refusals(AutoModel, resolve(str(copy), flag="--encoder")))


def test_an_llm_as_an_encoder_decoder_is_refused(llama_folder):
    assert re.search("it cannot be loaded .*LlamaConfig", refusals(AutoModelForSeq2SeqLM, llama_folder))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[]", '{"model": 3}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(
        InputError, match=r"tokenizer cannot be loaded \(.*copy the whole folder|tokenizer_config\.json"
    ):
        loading.load_tokenizer(resolve(str(copy), flag="--encoder"))


@pytest.mark.parametrize("kind", [None, "BertTokenizer", "GPT2Tokenizer", "T5Tokenizer", "XLMRobertaTokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(copy, kind):
    (copy / "tokenizer.json").unlink()
    edit_json(copy / "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(InputError, match=r"no vocabulary for its tokenizer \(.*|its tokenizer cannot be loaded"):
        loading.load_tokenizer(resolve(str(copy), flag="--encoder"))


def test_a_tokenizer_of_bytes_needs_no_vocabulary(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert loading.load_tokenizer(resolve(str(copy), flag="--encoder"))("a")["input_ids"] == [100, 1]


def test_configurations_are_those_of_transformers(encoder_folder, llama_folder, t5_folder):
    for folder in (encoder_folder, llama_folder, t5_folder):
        assert loading.load_config(folder).to_dict() == AutoConfig.from_pretrained(folder.path).to_dict()
    assert loading.llm_class(loading.load_config(llama_folder)) is AutoModelForCausalLM
    assert loading.llm_class(loading.load_config(t5_folder)) is AutoModelForSeq2SeqLM
