"""Quantized models of other libraries: their modules swapped for ours, and their checkpoints read."""
