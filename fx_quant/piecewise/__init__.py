"""A graph in pieces: cut at attention, each piece compiled once for all layers that are the same."""
