"""Adapters: one file per library whose modules a compiler cannot see into; see ``base`` for the registry."""
