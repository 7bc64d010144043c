"""Tiny encoders of every supported architecture and form of folder, and of some that must be refused.

`ENCODERS` is the table; each row builds a folder that sentence-transformers can load.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

from tests import models

WIDTH = 32
N_POSITIONS = 512
_SIZE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": N_POSITIONS,
}
_DECODER = {**_SIZE, "num_key_value_heads": 2, "head_dim": 8}
_BIDIRECTIONAL_GEMMA = {**_DECODER, "use_bidirectional_attention": True, "sliding_window": 8}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
_ROBERTA = {"max_position_embeddings": N_POSITIONS + 1}  # positions start behind the padding id, which is 0 here
# What an architecture needs besides the sizes of BERT.
_ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "distilbert": {},
    "electra": {"embedding_size": 16},
    "ernie": {},
    "eurobert": {"num_key_value_heads": 2},
    "gte": {},
    "megatron-bert": {},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "mpnet": _ROBERTA,
    "nomic_bert": {},
    "rembert": {"input_embedding_size": 16},
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
}
_DECODERS: Mapping[str, Mapping[str, Any]] = {
    "gemma": _DECODER,
    "gemma2": {**_DECODER, "sliding_window": 8},
    "gemma3_text": {**_DECODER, "sliding_window": 8},
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 8},
    "phi3": {**_SIZE, "num_key_value_heads": 2},
    "qwen2": {**_SIZE, "num_key_value_heads": 2},
    "qwen3": _DECODER,
    "smollm3": {**_SIZE, "num_key_value_heads": 2},
}
QUERY, DOCUMENT = "query: ", "title: none | text: "


@dataclass(frozen=True, kw_only=True)
class EncoderCase:
    """A folder of an encoder, and whether it works.

    Attributes:
        name: the architecture or the form of the folder.
        build: makes the folder and returns it.
        expected: `works`, or a part of the message that refuses it.
        bf16: whether it computes in bf16.
    """

    name: str
    build: Callable[[Path], Path]
    expected: str = "works"
    bf16: bool = True


def transformer(folder: Path, kind: str = "bert", *, architectures: str | None = None, **settings: Any) -> Path:
    """A plain transformers folder with random weights, large enough that outputs depend on all of the input."""
    (models.tiny_t5 if kind in ("t5", "mt5", "umt5") else models.tiny_encoder)(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + 8, pad_token_id=tokenizer.pad_token_id, **settings)
    torch.manual_seed(0)
    auto_class = AutoModelForTextEncoding if kind in ("t5", "mt5", "umt5") else AutoModel
    model = auto_class.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and 0 < parameter.std() < 0.15:
                parameter.mul_(0.15 / parameter.std())
    model.save_pretrained(folder)
    if architectures is not None:
        edit(folder / "config.json", architectures=[architectures])
    return folder


def sentence_transformer(
    folder: Path,
    *,
    kind: str = "bert",
    pooling: str | tuple[str, ...] = "mean",
    dense: Sequence[tuple[int, nn.Module]] = (),
    normalize: bool = True,
    settings: Mapping[str, Any] | None = None,
    include_prompt: bool = True,
    **options: Any,
) -> Path:
    """The same as `SentenceTransformer.save` writes it; `options` are of `SentenceTransformer`."""
    plain = transformer(folder / "plain", kind, **(settings or size_of(kind)))
    torch.manual_seed(1)
    body = Transformer(str(plain))
    width = body.get_embedding_dimension() * (1 if isinstance(pooling, str) else len(pooling))
    modules: list[nn.Module] = [
        body,
        Pooling(body.get_embedding_dimension(), pooling_mode=pooling, include_prompt=include_prompt),
    ]
    for out, activation in dense:
        modules.append(Dense(width, out, activation_function=activation))
        width = out
    if normalize:
        modules.append(Normalize())
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


def reference(folder: Path) -> SentenceTransformer:
    """sentence-transformers on the same folder, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def edit(file: Path, **changes: Any) -> Path:
    """Changes keys of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    return file.parent


def in_the_old_form(folder: Path) -> Path:
    """Rewrites a saved folder as sentence-transformers before 5.4 wrote it."""
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    names = {"lasttoken": "pooling_mode_lasttoken"}
    flag = names.get(pooling["pooling_mode"], f"pooling_mode_{pooling['pooling_mode']}_tokens")
    flag = "pooling_mode_cls_token" if pooling["pooling_mode"] == "cls" else flag
    old = {"word_embedding_dimension": pooling["embedding_dimension"], flag: True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    texts = {"max_seq_length": 24, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(texts))
    (folder / "config_sentence_transformers.json").unlink()
    return folder


def size_of(kind: str) -> Mapping[str, Any]:
    """The settings of a tiny model of this architecture."""
    return _DECODERS[kind] if kind in _DECODERS else {**_SIZE, **_ARCHITECTURES.get(kind, {})}


def _architecture(kind: str, pooling: str = "mean", **settings: Any) -> Callable[[Path], Path]:
    return lambda folder: sentence_transformer(folder, kind=kind, pooling=pooling, settings=settings or None)


def _lower_cased(folder: Path) -> Path:
    """A cased tokenizer and `do_lower_case`, which sentence-transformers applies in front of it."""
    saved = sentence_transformer(folder)
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(saved / "sentence_bert_config.json", do_lower_case=True)
    return saved


def _left_padded(folder: Path) -> Path:
    saved = sentence_transformer(folder, kind="qwen3", pooling="lasttoken")
    return edit(saved / "tokenizer_config.json", padding_side="left")


def _pickled_dense(folder: Path) -> Path:
    saved = sentence_transformer(folder, dense=[(16, nn.Tanh())])
    weights = load_file(saved / "2_Dense" / "model.safetensors")
    (saved / "2_Dense" / "model.safetensors").unlink()
    torch.save(weights, saved / "2_Dense" / "pytorch_model.bin")
    return saved


def _with_module(kind: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        saved = sentence_transformer(folder)
        modules = json.loads((saved / "modules.json").read_text())
        modules[1:1] = [{"idx": 1, "name": "1", "path": "", "type": kind}]
        (saved / "modules.json").write_text(json.dumps(modules))
        return saved

    return build


def _edited(file: str, **changes: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        saved = sentence_transformer(folder)
        edit(saved / file, **changes)
        return saved

    return build


def _pooled_without_modules(folder: Path) -> Path:
    plain = transformer(folder / "plain", **_SIZE)
    (plain / "1_Pooling").mkdir()
    (plain / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    return plain


def _saved(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: sentence_transformer(folder, **options)


_FP32_ONLY = ("deberta",)
ENCODERS: tuple[EncoderCase, ...] = (
    *(
        EncoderCase(name=kind, build=_architecture(kind), bf16=kind not in _FP32_ONLY)
        for kind in _ARCHITECTURES
    ),
    *(EncoderCase(name=kind, build=_architecture(kind, "lasttoken")) for kind in _DECODERS),
    EncoderCase(name="qwen3, bidirectional", build=_architecture("qwen3", **_DECODER, is_causal=False)),
    EncoderCase(name="gemma3_text, bidirectional", build=_architecture("gemma3_text", **_BIDIRECTIONAL_GEMMA)),
    *(EncoderCase(name=f"{kind} encoder", build=_architecture(kind, **_T5)) for kind in ("t5", "mt5", "umt5")),
    *(
        EncoderCase(name=f"{pooling} pooling", build=_saved(pooling=pooling))
        for pooling in ("cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    ),
    EncoderCase(name="cls and mean pooling", build=_saved(pooling=("cls", "mean"))),
    EncoderCase(name="old form, mean pooling", build=lambda folder: in_the_old_form(sentence_transformer(folder))),
    EncoderCase(
        name="old form, last token",
        build=lambda folder: in_the_old_form(sentence_transformer(folder, kind="qwen3", pooling="lasttoken")),
    ),
    EncoderCase(name="padded on the left", build=_left_padded),
    EncoderCase(name="Dense of the same width (LaBSE)", build=_saved(dense=[(WIDTH, nn.Tanh())])),
    EncoderCase(
        name="two Dense (EmbeddingGemma)", build=_saved(dense=[(64, nn.Identity()), (24, nn.Identity())])
    ),
    EncoderCase(name="no Normalize", build=_saved(normalize=False)),
    EncoderCase(name="prompts", build=_saved(prompts={"query": QUERY, "document": DOCUMENT})),
    EncoderCase(name="truncate_dim (Matryoshka)", build=_saved(truncate_dim=12)),
    EncoderCase(name="do_lower_case", build=_lower_cased),
    EncoderCase(name="max_seq_length", build=_edited("sentence_bert_config.json", max_seq_length=9)),
    EncoderCase(name="include_prompt: false", build=_saved(include_prompt=False)),
    EncoderCase(
        name="include_prompt: false, with prompts",
        build=_saved(include_prompt=False, prompts={"query": QUERY, "document": DOCUMENT}),
        expected="leaves the tokens of its prompt out of the pooling",
    ),
    EncoderCase(
        name="a default prompt",
        build=_saved(prompts={"d": DOCUMENT}, default_prompt_name="d"),
        expected="has no prompt named 'document', but has d",
    ),
    EncoderCase(
        name="a prompt for passages", build=_saved(prompts={"passage": "passage: "}), expected="but has passage"
    ),
    EncoderCase(
        name="WordWeights",
        build=_with_module("sentence_transformers.sentence_transformer.modules.word_weights.WordWeights"),
        expected="modules of type sentence_transformers.sentence_transformer.modules.word_weights.WordWeights",
    ),
    EncoderCase(
        name="a module of its own code", build=_with_module("custom_st.Transformer"), expected="custom_st.Transformer"
    ),
    EncoderCase(name="pickled Dense", build=_pickled_dense, expected="has no model.safetensors"),
    EncoderCase(
        name="an unknown pooling", build=_edited("1_Pooling/config.json", pooling_mode="attention"),
        expected="pooling_mode 'attention'",
    ),
    EncoderCase(
        name="chat messages",
        build=_edited("sentence_bert_config.json", modality_config={"message": {"method": "forward"}}),
        expected="modality_config",
    ),
    EncoderCase(
        name="a sparse encoder",
        build=_edited("config_sentence_transformers.json", model_type="SparseEncoder"),
        expected="a model of type SparseEncoder",
    ),
    EncoderCase(
        name="pooling without modules.json", build=_pooled_without_modules, expected="has 1_Pooling but no modules.json"
    ),
    EncoderCase(
        name="a causal model that declares no pooling",
        build=lambda folder: transformer(folder / "plain", "qwen3", architectures="Qwen3ForCausalLM", **_DECODER),
        expected="give --pooling",
    ),
    EncoderCase(
        name="bert as a decoder",
        build=lambda folder: transformer(folder / "plain", is_decoder=True, **_SIZE),
        expected="is a decoder",
    ),
    EncoderCase(
        name="fnet",
        build=lambda folder: transformer(folder / "plain", "fnet", **_SIZE),
        expected="is of type fnet, which is not supported",
    ),
    EncoderCase(
        name="xlnet",
        build=lambda folder: transformer(folder / "plain", "xlnet", d_model=WIDTH, n_layer=1, n_head=2, d_inner=64),
        expected="is of type xlnet, which is not supported",
    ),
    EncoderCase(
        name="gpt2",
        build=lambda folder: transformer(folder / "plain", "gpt2", n_embd=WIDTH, n_layer=1, n_head=2),
        expected="is of type gpt2, which is not supported",
    ),
)  # fmt: skip
