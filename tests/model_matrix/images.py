"""Models of images and sounds: of ``transformers``, ``timm`` and ``diffusers``; two layers of width 64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.model_matrix.registry import Model, seeded
from tests.model_matrix.text import NEEDS, SIZES, VOCABULARY, token_ids, transformer

_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def floats(*shape: int) -> torch.Tensor:
    """Normal ``shape``, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def images(batch: int, length: int) -> dict[str, Any]:
    """``[batch, 3, 32, 32]``."""
    return {"pixel_values": floats(batch, 3, 32, 32)}


def images_and_texts(batch: int, length: int) -> dict[str, Any]:
    """As many texts as images."""
    return {"input_ids": token_ids(batch, length), **images(batch, length)}


def sounds(batch: int, length: int) -> dict[str, Any]:
    """A spectrum ``[batch, 16, 32]`` and the tokens said so far."""
    return {
        "input_features": floats(batch, 16, 32),
        "decoder_input_ids": token_ids(batch, length),
        "use_cache": False,
    }


TRANSFORMERS = (
    Model("vit", partial(transformer, "ViTForImageClassification", "ViTConfig", _VISION), images, NEEDS),
    Model(
        "clip",
        partial(
            transformer,
            "CLIPModel",
            "CLIPConfig",
            {"text_config": SIZES, "vision_config": _VISION, "projection_dim": 48},
        ),
        images_and_texts,
        NEEDS,
    ),
    Model(
        "siglip",
        partial(transformer, "SiglipModel", "SiglipConfig", {"text_config": SIZES, "vision_config": _VISION}),
        images_and_texts,
        NEEDS,
    ),
    Model(
        "whisper",
        partial(
            transformer,
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {
                "vocab_size": VOCABULARY,
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "num_mel_bins": 16,
                "max_source_positions": 16,
                "max_target_positions": 32,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "decoder_start_token_id": 1,
            },
        ),
        sounds,
        NEEDS,
    ),
)


def of_timm(name: str, **fields: Any) -> nn.Module:
    """timm's model ``name`` for images of 32 x 32."""
    import timm

    return seeded(lambda: timm.create_model(name, pretrained=False, num_classes=11, **fields))


def mixer() -> nn.Module:
    """timm's MLP-Mixer of 16 patches, whose named ones have sizes that cannot be changed."""
    from timm.models.mlp_mixer import MlpMixer

    return seeded(lambda: MlpMixer(num_classes=11, img_size=32, patch_size=8, num_blocks=2, embed_dim=64))


def pixels(batch: int, length: int) -> dict[str, Any]:
    """As timm calls them."""
    return {"x": floats(batch, 3, 32, 32)}


_NAMED = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2,), "num_heads": (2,)},
    ),
}
TIMM = (
    *(
        Model(f"timm-{name}", partial(of_timm, timm_name, **fields), pixels, ("timm",))
        for name, (timm_name, fields) in _NAMED.items()
    ),
    Model("timm-mixer", mixer, pixels, ("timm",)),
)


def of_diffusers(name: str, fields: dict[str, Any]) -> nn.Module:
    """diffusers' model ``name``."""
    import diffusers

    return seeded(lambda: getattr(diffusers, name)(**fields))


def flux(batch: int, length: int) -> dict[str, Any]:
    """16 patches of latents beside ``length`` tokens of text."""
    return {
        "hidden_states": floats(batch, 16, 4),
        "encoder_hidden_states": floats(batch, length, 32),
        "pooled_projections": floats(batch, 32),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(length, 3),
    }


def stable_diffusion_3(batch: int, length: int) -> dict[str, Any]:
    """Latents ``[batch, 4, 8, 8]`` beside ``length`` tokens of text."""
    return {
        "hidden_states": floats(batch, 4, 8, 8),
        "encoder_hidden_states": floats(batch, length, 32),
        "pooled_projections": floats(batch, 32),
        "timestep": torch.full((batch,), 500),
    }


def diffusion_transformer(batch: int, length: int) -> dict[str, Any]:
    """Latents ``[batch, 4, 8, 8]`` and the class of each."""
    return {
        "hidden_states": floats(batch, 4, 8, 8),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % 7,
    }


def unet(batch: int, length: int) -> dict[str, Any]:
    """Latents ``[batch, 4, 8, 8]`` beside ``length`` tokens of text."""
    return {
        "sample": floats(batch, 4, 8, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": floats(batch, length, 32),
    }


DIFFUSERS = (
    Model(
        "flux",
        partial(
            of_diffusers,
            "FluxTransformer2DModel",
            {
                "in_channels": 4,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
                "axes_dims_rope": (4, 4, 8),
            },
        ),
        flux,
        ("diffusers",),
    ),
    Model(
        "sd3",
        partial(
            of_diffusers,
            "SD3Transformer2DModel",
            {
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "caption_projection_dim": 64,
                "pooled_projection_dim": 32,
                "pos_embed_max_size": 8,
            },
        ),
        stable_diffusion_3,
        ("diffusers",),
    ),
    Model(
        "dit",
        partial(
            of_diffusers,
            "DiTTransformer2DModel",
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "in_channels": 4,
                "num_layers": 2,
                "sample_size": 8,
                "norm_num_groups": 4,
                "num_embeds_ada_norm": 7,
            },
        ),
        diffusion_transformer,
        ("diffusers",),
    ),
    Model(
        "unet",
        partial(
            of_diffusers,
            "UNet2DConditionModel",
            {
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 32,
                "attention_head_dim": 16,
                "norm_num_groups": 8,
            },
        ),
        unet,
        ("diffusers",),
    ),
)
