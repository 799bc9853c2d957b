"""Every model of the matrix."""

from __future__ import annotations

from tests.model_matrix import images, text

MODELS = (
    *text.DECODERS,
    *text.ENCODERS,
    *text.BOTH,
    *images.TRANSFORMERS,
    *images.TIMM,
    *images.DIFFUSERS,
)
