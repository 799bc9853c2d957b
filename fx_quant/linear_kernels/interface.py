"""The interface of a linear kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fx_quant.linear_kernels.configs import MMLinearLayerConfig
from fx_quant.linear_kernels.params import Params

ConfigT = TypeVar("ConfigT", bound=MMLinearLayerConfig)
ParamsT = TypeVar("ParamsT", bound=Params)
Verdict = tuple[bool, str | None]


class MMLinearKernel(ABC, Generic[ConfigT, ParamsT]):
    """One way to run a quantized linear layer, to be subclassed with a configuration and parameters of one's own.

    Lifecycle: ``is_supported`` and ``can_implement`` are asked first; ``__init__`` takes the configuration;
    ``process_weights_after_loading`` prepares a layer once; ``apply_weights`` runs it.
    """

    @classmethod
    @abstractmethod
    def is_supported(cls, compute_capability: Any = None) -> Verdict:
        """Whether the hardware can run it, and why not.

        Args:
            compute_capability: ``90`` for an H100; for our kernels also a ``Target`` or its name. None asks for the
                machine that this runs on.
        """

    @classmethod
    @abstractmethod
    def can_implement(cls, config: ConfigT) -> Verdict:
        """Whether it can run ``config`` on hardware that supports it, and why not."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Prepare ``layer``'s tensors, once, with ``replace_parameter``."""

    @abstractmethod
    def _get_layer_params(self, layer: nn.Module, **kwargs: Any) -> ParamsT:
        """The typed parameters of ``layer``."""

    def get_output_padding(self) -> int | None:
        """Rows to which an eager call pads fewer, or None."""
        return None

    @abstractmethod
    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``[..., k] -> [..., n]``."""
