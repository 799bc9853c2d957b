"""Tensor parallel: an MLP of int8 weights split over two processes by DTensor, each of which compiles its part.

``torchrun --standalone --nproc-per-node 2 examples/13_tensor_parallel.py``; ``python`` alone starts that by itself. The
first linear is split by columns, the second by rows; what a rank compiles holds its own shards and one all-reduce.
Exits with 1 where a rank missed a linear, or has another result than the whole model.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from tiny import CLOSE, distance
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import fx_quant

RANKS = 2


class Int8Linear(nn.Module):
    """``x @ (weight * scale).T``: int8 codes ``[n, k]`` and a scale for each channel ``[n]``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        codes = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]``."""
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None])


class MLP(nn.Module):
    """Two linears and what stands between them; ``forward(x[m, k]) -> [m, k]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = Int8Linear(nn.Linear(width, 4 * width)), Int8Linear(nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The result of all ranks."""
        return self.down(nn.functional.gelu(self.up(x)))


class Split(nn.Module):
    """``mlp`` over the ranks of ``mesh``: ``up`` by columns, ``down`` by rows."""

    def __init__(self, mlp: MLP, mesh: dist.DeviceMesh) -> None:
        super().__init__()
        self.mlp, self.mesh = mlp, mesh
        of: dict[str, Placement] = {
            "up.weight": Shard(0),
            "up.scale": Shard(0),
            "down.weight": Shard(1),
            "down.scale": Replicate(),
        }
        for name, placement in of.items():
            linear, attribute = mlp.get_submodule(name.split(".")[0]), name.split(".")[1]
            shard = distribute_tensor(getattr(linear, attribute).data, mesh, [placement])
            setattr(linear, attribute, nn.Parameter(shard, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """The same on every rank."""
        out = self.mlp(DTensor.from_local(x, self.mesh, [Replicate()], run_check=False))
        return out.redistribute(placements=[Replicate()]).to_local()


@torch.no_grad()
def on_rank(width: int = 64) -> int:
    """What each rank does, in the default process group; returns the exit status."""
    torch.manual_seed(0)  # the same weights and input on every rank
    whole, x = MLP(width), torch.randn(8, width)
    expected = whole(x)
    split = Split(whole, dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    before = counters["fx_quant"]["rewritten"]
    away = distance(torch.compile(split, backend="fx_quant")(x), expected)
    rewritten = counters["fx_quant"]["rewritten"] - before
    held = sum(p.to_local().numel() for p in split.parameters() if isinstance(p, DTensor) and p.dtype == torch.int8)
    line = f"rank {dist.get_rank()}: {rewritten} of 2 rewritten, {held} bytes of codes, {away:.6f} from the whole model"
    # In one piece, as all ranks write to one pipe.
    os.write(1, f"{line}\n".encode())
    return int(rewritten != 2 or away > CLOSE)


def main() -> int:
    """Start torchrun, or be one of its ranks; returns the exit status."""
    if "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        return subprocess.run([*launch, __file__], check=False).returncode
    dist.init_process_group("gloo")
    try:
        if dist.get_rank() == 0:
            print(f"fx_quant {fx_quant.__version__} on {dist.get_world_size()} ranks", flush=True)
        return on_rank()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
