"""How our Triton kernels are launched: architectures, configurations, and what they cost.

Nothing here imports Triton before a launch is planned.
"""
