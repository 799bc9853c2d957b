"""FX in, FX out: values, sites, canonical ops, kernel ops."""
