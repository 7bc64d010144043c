"""Tiny random models in real model folders: an encoder, a Llama-like and a T5-like LLM, deterministic given a seed."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.chats import ZEPHYR

ENCODER_WIDTH, LLM_WIDTH = 32, 48
# Every configuration has dropout, to catch a model left in train mode. Weights are large, so that outputs depend on all
# of the input.
_DROPOUT, _SPREAD = 0.2, 0.3
_WORDS = (
    "the",
    "a",
    "of",
    "and",
    "in",
    "to",
    "for",
    "paper",
    "title",
    "review",
    "movie",
    "rating",
    "is",
    "i",
    "like",
    "it",
)


def tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """A BERT of width 32 with 512 positions; its tokens are the printable ASCII characters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *_WORDS]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=ENCODER_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        hidden_dropout_prob=_DROPOUT,
        attention_probs_dropout_prob=_DROPOUT,
        initializer_range=_SPREAD,
    )
    torch.manual_seed(seed)
    return _save(folder, BertModel(config), tokenizer, {**names, "mask_token": "[MASK]", "model_max_length": 512})


def tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A byte-level Llama of width 48: `<s>` starts a text, `</s>` ends an answer, and there is no padding token."""
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*special, *alphabet])}
    merges = []
    for word in _WORDS:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                vocabulary.setdefault(word[: end + 1], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=LLM_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        attention_dropout=_DROPOUT,
        initializer_range=_SPREAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return _save(
        folder,
        LlamaForCausalLM(config),
        tokenizer,
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    )


def tiny_chat_llama(folder: Path, seed: int = 0) -> Path:
    """The tiny Llama with a chat template."""
    tiny_llama(folder, seed)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + ZEPHYR)
    return folder


def tiny_t5(folder: Path, seed: int = 0) -> Path:
    """A FlanT5-like model of width 48; as in FlanT5, white space is collapsed and some characters are unknown."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(33, 127) if chr(code) not in "{}~"]
    pieces = ["▁", *letters, *(f"▁{word}" for word in _WORDS)]
    scores = [*((piece, 0.0) for piece in special), *((piece, -3.0) for piece in dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(
        vocab_size=len(scores),
        d_model=LLM_WIDTH,
        d_kv=12,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=_DROPOUT,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    torch.manual_seed(seed)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        # With the initial scale it repeats its last token forever: that token's embedding outweighs everything else.
        model.shared.weight.mul_(_SPREAD)
        model.lm_head.weight.mul_(_SPREAD)
    return _save(folder, model, tokenizer, names)


def tiny_llm(folder: Path, model_type: str, seed: int = 0, **settings: Any) -> Path:
    """A causal or encoder-decoder LLM of any type of transformers, with the tokenizer of `tiny_llama` or `tiny_t5`."""
    config = AutoConfig.for_model(model_type, **settings)
    (tiny_t5 if config.is_encoder_decoder else tiny_llama)(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and 0 < parameter.std() < _SPREAD:
                parameter.mul_(_SPREAD / parameter.std())
    model.save_pretrained(folder)
    return folder


def _save(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, settings: dict[str, object]) -> Path:
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    return folder
