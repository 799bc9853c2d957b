"""Eager layers: linears that hold codes, and how weights and activations are quantized."""
