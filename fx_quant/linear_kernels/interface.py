"""The interface of a linear kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fx_quant.kernels.select import know_class
from fx_quant.linear_kernels.configs import MMLinearLayerConfig
from fx_quant.linear_kernels.params import Params

ConfigT = TypeVar("ConfigT", bound=MMLinearLayerConfig)
ParamsT = TypeVar("ParamsT", bound=Params)
Answer = tuple[bool, str | None]
ASKED = ("is_supported", "can_implement")


class MMLinearKernel(ABC, Generic[ConfigT, ParamsT]):
    """One way to run a quantized linear layer, to be subclassed with a configuration and parameters of one's own.

    Lifecycle: ``is_supported`` and ``can_implement`` are asked first; ``__init__`` takes the configuration;
    ``process_weights_after_loading`` prepares a layer once; ``apply_weights`` runs it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        know_class(cls.__name__)

    @classmethod
    @abstractmethod
    def is_supported(cls, compute_capability: Any = None) -> Answer:
        """Whether the hardware can run it, and why not.

        Args:
            compute_capability: ``90`` for an H100; for our kernels also a ``Target`` or its name. None asks for the
                machine that this runs on.
        """

    @classmethod
    @abstractmethod
    def can_implement(cls, config: ConfigT) -> Answer:
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


def refusal(kernel: type[MMLinearKernel], method: str, argument: Any) -> str | None:
    """Why ``kernel.method(argument)`` is no yes, in one line that is never empty; None for a yes.

    A bare bool is an answer too. One of another form, and an exception, are a no: they cannot be told from a mistake.
    """
    try:
        answer = getattr(kernel, method)(argument)
    except Exception as error:  # noqa: BLE001  (somebody else's code, after which the next class is asked)
        return one_line(f"{method} raised {type(error).__name__}: {error}")
    pair = (answer, None) if isinstance(answer, bool) else answer
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], bool)):
        return one_line(f"{method} must return (bool, reason), got {answer!r}")
    holds, reason = pair
    return None if holds else one_line("" if reason is None else str(reason)) or f"{method} gave no reason"


def one_line(text: str) -> str:
    """``text`` with each run of white space as one space."""
    return " ".join(text.split())
