"""Counters that are zero whenever no kernel runs: how the programs of a split sum know which of them is the last."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# 1 MiB on each device. A stream's own counters suffice for every split sum: there are fewer tiles than processors.
_RESERVED = 1 << 18
_OF_A_STREAM = 1 << 12


class _Reserve:
    """The counters of one device: zeroed once, handed out from the front, never given back."""

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._used = 0
        self._of_stream: dict[int, Tensor] = {}
        # In a thread of its own, because Inductor's CUDA graph trees put what this one allocates during a warm-up into
        # their pool, where nothing may outlive it. It waits for them, as any stream may count next.
        filling = threading.Thread(target=self._fill, args=(device,))
        filling.start()
        filling.join()

    def _fill(self, device: torch.device) -> None:
        self._counters = torch.zeros(_RESERVED, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()

    def _take(self, size: int) -> Tensor | None:
        if self._used + size > _RESERVED:
            return None
        self._used += size
        return self._counters[self._used - size : self._used]

    def of_stream(self, stream: int, size: int) -> Tensor | None:
        """Counters that every launch on ``stream`` uses."""
        if size > _OF_A_STREAM:
            return None
        with self._lock:
            if stream not in self._of_stream:
                taken = self._take(_OF_A_STREAM)
                if taken is None:
                    return None
                self._of_stream[stream] = taken
            return self._of_stream[stream][:size]

    def of_launch(self, size: int) -> Tensor | None:
        """Counters that no other launch uses."""
        with self._lock:
            return self._take(size)


_RESERVES: dict[torch.device, _Reserve] = {}
_LOCK = threading.Lock()


def semaphores(size: int, device: torch.device) -> Tensor:
    """``size`` int32 counters that are zero, for one launch on the current stream, which leaves them zero again.

    Two launches never count by the same ones at the same time. Launches on one stream run one after another, so they
    share those of their stream. A launch that is captured into a CUDA graph gets counters of its own, for the graph may
    be replayed on any stream, but never beside itself. Where none are left, or none could be reserved before a capture
    began, fresh ones are zeroed, by a kernel that the graph then holds too.
    """
    counters = None
    if device.type == "cuda":
        with torch.cuda.device(device):
            device = torch.device("cuda", torch.cuda.current_device())
            capturing = torch.cuda.is_current_stream_capturing()
            with _LOCK:
                if device not in _RESERVES and not capturing:
                    _RESERVES[device] = _Reserve(device)
            reserve = _RESERVES.get(device)
            if reserve is not None and capturing:
                counters = reserve.of_launch(size)
            elif reserve is not None:
                counters = reserve.of_stream(torch.cuda.current_stream(device).cuda_stream, size)
    return torch.zeros(size, dtype=torch.int32, device=device) if counters is None else counters
