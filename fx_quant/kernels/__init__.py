"""Kernels: one file per provider, found by listing this folder."""
