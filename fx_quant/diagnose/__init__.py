"""What fx_quant would do, does, and costs in accuracy: explain, check, and the tables of the command line."""
