"""Random programs, compared with what they mean: ``python -m tests.fuzz --graphs 20000 --seed 0``.

A program is a few lines of PyTorch (``program``), drawn by ``grammar`` from a seed. ``oracle`` traces it as the backend
would get it, rewrites it and says what is wrong: other values, other aliases, another state, an exception, a quantized
matmul that nothing is said of. ``shrink`` drops lines as long as the fault stays, and ``planted`` breaks rules on
purpose, to show that the faults are found.
"""

from __future__ import annotations
