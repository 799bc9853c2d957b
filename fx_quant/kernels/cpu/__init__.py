"""The CPU provider: kernels, native sources, and the candidates of its tuner."""
