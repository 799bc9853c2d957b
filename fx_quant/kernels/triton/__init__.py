"""How our Triton kernels are launched: architectures, configurations, what they cost, and how they are compiled.

Nothing here imports Triton before a launch is planned.
"""
