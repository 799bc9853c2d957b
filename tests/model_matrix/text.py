"""Models of text of ``transformers``: decoders, encoders, and both; two layers of width 64, an odd vocabulary."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.model_matrix.registry import Model, seeded

VOCABULARY = 131
NEEDS = ("transformers",)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


def transformer(model: str, config: str, fields: dict[str, Any]) -> nn.Module:
    """``transformers``' class ``model`` of a ``config`` with ``fields``, random weights, in eval mode."""
    import transformers

    return seeded(lambda: getattr(transformers, model)(getattr(transformers, config)(**fields)))


def token_ids(batch: int, length: int) -> torch.Tensor:
    """``[batch, length]``, always the same; no padding among them."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def decoded(batch: int, length: int) -> dict[str, Any]:
    """A decoder's arguments."""
    return {"input_ids": token_ids(batch, length), "use_cache": False}


def encoded(batch: int, length: int) -> dict[str, Any]:
    """An encoder's arguments; the last token of each row but the first is padding."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, -1] = 0
    return {"input_ids": token_ids(batch, length), "attention_mask": mask}


def translated(batch: int, length: int) -> dict[str, Any]:
    """The arguments of an encoder and decoder."""
    return {
        "input_ids": token_ids(batch, length),
        "decoder_input_ids": token_ids(batch, length + 2),
        "use_cache": False,
    }


def sentence_encoder() -> nn.Module:
    """A ``SentenceTransformer`` of a BERT, mean pooling and a norm, loaded from a folder."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    with tempfile.TemporaryDirectory() as folder:
        transformer("BertModel", "BertConfig", SIZES).save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)
        encoder = modules.Transformer(folder)
    return SentenceTransformer(modules=[encoder, modules.Pooling(64), modules.Normalize()]).eval().requires_grad_(False)


def sentences(batch: int, length: int) -> dict[str, Any]:
    """Tokens as ``encode`` hands them to the modules."""
    return {"input": encoded(batch, length)}


def _decoder(name: str, family: str, **fields: Any) -> Model:
    build = partial(transformer, f"{family}ForCausalLM", fields.pop("config", f"{family}Config"), fields)
    return Model(name, build, decoded, NEEDS)


DECODERS = (
    _decoder("llama", "Llama", **SIZES, **_GROUPED),
    _decoder("qwen2", "Qwen2", **SIZES, num_key_value_heads=2),
    _decoder("qwen3", "Qwen3", **SIZES, **_GROUPED),
    _decoder("gemma2", "Gemma2", **SIZES, **_GROUPED, **_WINDOWS, query_pre_attn_scalar=16),
    _decoder("gemma3", "Gemma3", config="Gemma3TextConfig", **SIZES, **_GROUPED, **_WINDOWS, query_pre_attn_scalar=16),
    _decoder("mistral", "Mistral", **SIZES, **_GROUPED, sliding_window=4),
    _decoder("phi3", "Phi3", **SIZES, num_key_value_heads=2),
    Model(
        "gpt2",
        partial(
            transformer,
            "GPT2LMHeadModel",
            "GPT2Config",
            {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ),
        decoded,
        NEEDS,
    ),
    _decoder("gptneox", "GPTNeoX", **SIZES),
    _decoder("bloom", "Bloom", vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    _decoder("opt", "OPT", **SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    _decoder("falcon", "Falcon", **SIZES, new_decoder_architecture=True, num_kv_heads=2),
    _decoder("deepseek-v2", "DeepseekV2", **SIZES, **_LATENT, topk_method="greedy"),
    _decoder("deepseek-v3", "DeepseekV3", **SIZES, **_LATENT),
    _decoder("mixtral", "Mixtral", **SIZES, **_GROUPED, num_local_experts=4),
    _decoder(
        "qwen3-moe", "Qwen3Moe", **SIZES, **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    _decoder("gpt-oss", "GptOss", **SIZES, **_GROUPED, **_WINDOWS, num_local_experts=4, num_experts_per_tok=2),
    _decoder("mamba", "Mamba", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8),
    _decoder(
        "mamba2",
        "Mamba2",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=16,
        n_groups=2,
        chunk_size=4,
    ),
)

ENCODERS = (
    Model("bert", partial(transformer, "BertForSequenceClassification", "BertConfig", SIZES), encoded, NEEDS),
    Model(
        "modernbert",
        partial(
            transformer,
            "ModernBertForMaskedLM",
            "ModernBertConfig",
            SIZES | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
        ),
        encoded,
        NEEDS,
    ),
    Model("sentence-bert", sentence_encoder, sentences, ("sentence-transformers",)),
)

BOTH = (
    Model(
        "t5",
        partial(
            transformer,
            "T5ForConditionalGeneration",
            "T5Config",
            {
                "vocab_size": VOCABULARY,
                "d_model": 64,
                "d_ff": 96,
                "d_kv": 16,
                "num_layers": 2,
                "num_heads": 4,
                "feed_forward_proj": "gated-gelu",
                "decoder_start_token_id": 0,
            },
        ),
        translated,
        NEEDS,
    ),
    Model(
        "bart", partial(transformer, "BartForConditionalGeneration", "BartConfig", _ENCODER_DECODER), translated, NEEDS
    ),
)
