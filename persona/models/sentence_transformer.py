"""Reads what a sentence-transformers folder declares besides the model: each declaration is applied or refused by name.

A folder without `modules.json` is a plain transformers model and declares nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from persona.errors import InputError, UsageError
from persona.models.resolve import ModelFolder
from persona.options import Pooling

_MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
# Older versions name this file after the architecture.
_TEXT = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# The form before sentence-transformers 5.4, in the order in which several are concatenated.
_POOLING_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING_KEYS = {*_POOLING_FLAGS, "pooling_mode", "include_prompt", "embedding_dimension", "word_embedding_dimension"}
ACTIVATIONS = ("GELU", "Identity", "ReLU", "Sigmoid", "SiLU", "Tanh")
_DENSE_KEYS = {
    "activation_function",
    "bias",
    "in_features",
    "module_input_name",
    "module_output_name",
    "out_features",
    "use_residual",
}
# Values that change nothing here: how a model is loaded, and the one way of reading its output that we have.
_PLAIN_OUTPUT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_TEXT_DEFAULTS: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": _PLAIN_OUTPUT,
    "module_output_name": "token_embeddings",
    "processing_kwargs": {},
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
    "tokenizer_name_or_path": None,
}
_LOADING = {"add_pooling_layer", "attn_implementation", "device_map", "dtype", "padding_side", "torch_dtype"}
_LOADING_KEYS = (
    "model_args",
    "model_kwargs",
    "tokenizer_args",
    "processor_kwargs",
    "config_args",
    "config_kwargs",
)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A linear layer behind the pooling; its weights are in `folder`."""

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str
    residual: bool


Layer = Dense | Literal["normalize"]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What the folder of an encoder declares; the defaults are those of a plain transformers model.

    Attributes:
        name: of the model, for messages.
        pooling: one or more modes, joined by `+`; None if the folder declares none.
        layers: what follows the pooling, in order.
        prompts: texts in front of what is encoded, by name.
        default_prompt: the name of the one for texts that are neither query nor document.
        prompt_is_pooled: whether tokens of the prompt count in the pooling.
        max_tokens: texts are cut to this length.
        width: vectors are cut to this width.
    """

    name: str
    pooling: str | None = None
    layers: tuple[Layer, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    prompt_is_pooled: bool = True
    lower_case: bool = False
    max_tokens: int | None = None
    width: int | None = None

    def document_prompt(self, given: str | None = None) -> str:
        """The prompt of behaviors: `given`, or else that of sentence-transformers' `encode_document`.

        Raises:
            UsageError: the folder has a prompt that `encode_document` passes over, or one that is not pooled.
        """
        return self._prompt(given, "document", also=("passage", "corpus"))

    def query_prompt(self, given: str | None = None) -> str:
        """The same for queries, as `encode_query` does."""
        return self._prompt(given, "query", also=())

    def _prompt(self, given: str | None, kind: str, *, also: tuple[str, ...]) -> str:
        prompt = self.prompts.get(kind, "") if given is None else given
        if prompt and not self.prompt_is_pooled:
            raise UsageError(
                f"the encoder {self.name!r} leaves the tokens of its prompt out of the pooling, which is not "
                f'supported; encode without a prompt (--{kind}-prompt ""), or take another encoder'
            )
        # In sentence-transformers 6.2 the prompt `document` always exists, so that it hides these.
        others = [name for name in (*also, self.default_prompt) if name is not None and self.prompts.get(name)]
        if given is None and not prompt and others:
            named = ", ".join(f"{name} ({self.prompts[name]!r})" for name in dict.fromkeys(others))
            raise UsageError(
                f"the encoder {self.name!r} has no prompt named {kind!r}, but has {named}, which sentence-transformers "
                f'does not use for a {kind}; choose one with --{kind}-prompt TEXT, or none with --{kind}-prompt ""'
            )
        return prompt


def read(folder: ModelFolder) -> Declaration:
    """What the folder declares. Raises InputError for what cannot be applied, with its file and key."""
    root = folder.path
    if not (root / _MODULES).is_file():
        parts = [name for name in ("1_Pooling", _PROMPTS, *_TEXT) if (root / name).exists()]
        if parts:
            raise InputError(
                f"the encoder {folder.name!r} has {parts[0]} but no {_MODULES}, so part of a sentence-transformers "
                "folder is missing; copy the whole folder"
            )
        return Declaration(name=folder.name, max_tokens=_longest({}, root))
    pooling, include_prompt, layers = _modules(root)
    prompts = _object(root / _PROMPTS) if (root / _PROMPTS).is_file() else {}
    texts = next((_object(root / name) for name in _TEXT if (root / name).is_file()), {})
    _check_prompts(prompts, root / _PROMPTS)
    _check_texts(texts, root)
    return Declaration(
        name=folder.name,
        pooling=pooling,
        layers=layers,
        prompts={name: text or "" for name, text in (prompts.get("prompts") or {}).items()},
        default_prompt=prompts.get("default_prompt_name"),
        prompt_is_pooled=include_prompt,
        lower_case=bool(texts.get("do_lower_case")),
        max_tokens=_longest(texts, root),
        width=prompts.get("truncate_dim"),
    )


def _modules(root: Path) -> tuple[str, bool, tuple[Layer, ...]]:
    """The pooling, whether it includes the prompt, and the layers behind it."""
    modules = [_module(root, entry) for entry in _parsed(root / _MODULES, list)]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & {*kinds[2:]}:
        raise InputError(
            f"{root / _MODULES}: the modules {' → '.join(kinds) or '(none)'} are not supported; what works is "
            "Transformer → Pooling, then any number of Dense and Normalize"
        )
    pooling, include_prompt = _pooling(modules[1][1] / "config.json")
    layers: list[Layer] = [_dense(path) if kind == "Dense" else "normalize" for kind, path in modules[2:]]
    return pooling, include_prompt, tuple(layers)


def _module(root: Path, entry: Any) -> tuple[str, Path]:
    """The kind of a module and its folder."""
    where = root / _MODULES
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or not isinstance(entry.get("path"), str):
        raise InputError(f"{where}: {entry!r} is not a module with type and path")
    kind = entry["type"].rpartition(".")[2]
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    if not entry["type"].startswith("sentence_transformers.") or kind not in known:
        raise InputError(
            f"{where}: modules of type {entry['type']} are not supported, only {', '.join(known)} of "
            "sentence-transformers; take another encoder"
        )
    if entry.get("kwargs"):
        raise InputError(f"{where}: the module {kind} takes {entry['kwargs']!r} with each text, which is not supported")
    path = (root / entry["path"]).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InputError(f"{where}: the path {entry['path']!r} leads out of the model's folder")
    if kind == "Transformer" and path != root.resolve():
        raise InputError(f"{where}: the Transformer is in {entry['path']!r}; it must be in the folder itself")
    return kind, path


def _pooling(file: Path) -> tuple[str, bool]:
    config = _object(file)
    _check_keys(config, _POOLING_KEYS, file)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    unknown = [mode for mode in modes if mode not in get_args(Pooling)]
    if unknown or not modes:
        raise InputError(f"{file}: pooling_mode {config['pooling_mode']!r} must be {', '.join(get_args(Pooling))}")
    return "+".join(modes), bool(config.get("include_prompt", True))


def _dense(folder: Path) -> Dense:
    file = folder / "config.json"
    config = _object(file)
    _check_keys(config, _DENSE_KEYS, file)
    # sentence-transformers writes the full name of torch's class, and takes Tanh if there is none.
    module, _, activation = config.get("activation_function", "torch.nn.Tanh").rpartition(".")
    if not f"{module}.".startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise InputError(
            f"{file}: activation_function {config['activation_function']!r} is not supported; torch's "
            f"{', '.join(ACTIVATIONS)} are"
        )
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise InputError(f"{file}: {name} {config[name]!r} is not supported, only 'sentence_embedding'")
    if not (folder / "model.safetensors").is_file():
        raise InputError(
            f"{folder} has no model.safetensors; pickled weights are never loaded, so convert them first (load the "
            "model with sentence-transformers and save it again)"
        )
    try:
        return Dense(
            folder=folder,
            inputs=int(config["in_features"]),
            outputs=int(config["out_features"]),
            bias=bool(config.get("bias", True)),
            activation=activation,
            residual=bool(config.get("use_residual")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: in_features and out_features must be numbers ({error})") from error


def _longest(texts: Mapping[str, Any], root: Path) -> int | None:
    """Tokens of a text: as sentence-transformers says, or else the tokenizer."""
    longest = texts.get("max_seq_length")
    tokenizer = root / "tokenizer_config.json"
    if longest is None and tokenizer.is_file():
        longest = _object(tokenizer).get("model_max_length")
    # transformers writes a number beyond all integers for no limit.
    return int(longest) if isinstance(longest, int | float) else None


def _check_prompts(config: Mapping[str, Any], file: Path) -> None:
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise InputError(f"{file}: a model of type {kind} gives no vector of a text; take a SentenceTransformer")
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    texts_only = isinstance(prompts, dict) and all(isinstance(text, str | None) for text in prompts.values())
    if not texts_only or (default is not None and default not in prompts):
        raise InputError(f"{file}: prompts must be texts by name, and default_prompt_name one of these names")
    width = config.get("truncate_dim")
    if width is not None and (not isinstance(width, int) or width < 1):
        raise InputError(f"{file}: truncate_dim {width!r} must be 1 or more")


def _check_texts(config: Mapping[str, Any], root: Path) -> None:
    file = next((root / name for name in _TEXT if (root / name).is_file()), root)
    _check_keys(config, {*_TEXT_DEFAULTS, *_LOADING_KEYS, "max_seq_length", "do_lower_case", "unpad_inputs"}, file)
    for name, default in _TEXT_DEFAULTS.items():
        if config.get(name) not in (None, default):
            raise InputError(f"{file}: {name} {config[name]!r} is not supported, only {default!r}")
    for name in _LOADING_KEYS:
        _check_keys(config.get(name) or {}, _LOADING, file, within=f"{name}.")
    longest = config.get("max_seq_length")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise InputError(f"{file}: max_seq_length {longest!r} must be 1 or more")


def _check_keys(config: Mapping[str, Any], known: set[str], file: Path, *, within: str = "") -> None:
    unknown = sorted({*config} - known)
    if unknown:
        raise InputError(f"{file}: {within}{unknown[0]} {config[unknown[0]]!r} is not supported; take another encoder")


def _object(file: Path) -> dict[str, Any]:
    return dict(_parsed(file, dict))


def _parsed(file: Path, kind: type) -> Any:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); copy the whole folder again") from error
    if not isinstance(found, kind):
        raise InputError(f"{file} holds {type(found).__name__}, not {kind.__name__}; copy the whole folder again")
    return found
