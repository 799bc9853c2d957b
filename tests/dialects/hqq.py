"""HQQ's weights: ``((codes - zero) * scale).reshape(shape)`` with float zeros, the groups along either axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dialects.hand import NOT_FASTER
from tests.dialects.registry import flow
from tests.dialects.weights import HandLinear

GROUP = 64


class Hqq(HandLinear):
    """``packed`` two codes to a byte, the first half of the rows high; ``scale`` and ``zero`` in the model's dtype."""

    axis: int

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        groups = weight.reshape((-1, GROUP) if self.axis else (GROUP, -1))
        low, high = groups.amin(self.axis, keepdim=True), groups.amax(self.axis, keepdim=True)
        scale = (high - low) / 15
        zero = -low / scale
        codes = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8)
        first, second = codes.chunk(2)
        self.register_buffer("packed", first << 4 | second)
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("zero", zero.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.packed.shape[0]
        codes = torch.empty([2 * rows, self.packed.shape[1]], dtype=x.dtype, device=self.packed.device)
        codes[:rows] = (self.packed & 0b11110000) >> 4
        codes[rows:] = self.packed & 0b00001111
        weight = ((codes - self.zero) * self.scale).reshape(self.n, self.k)
        return F.linear(x, weight, self.bias)


@flow("hqq_axis_1", group="developers", expected="recognised", why=NOT_FASTER)
class AlongK(Hqq):
    """4 bits, groups of 64 along k, float zeros"""

    axis = 1


@flow("hqq_axis_0", expected="unsupported", why="each k of 64 rows has a scale of its own, which cannot leave the sum")
class AcrossRows(Hqq):
    """4 bits, groups of 64 strided rows, float zeros"""

    axis = 0
