"""Attention over packed pages and appending to them, on GPUs, in Triton: no build step.

``schedule.py`` chooses how a shape runs and is plain Python; ``decode.py`` and ``quantize.py``
launch the kernels, and are imported only where a GPU is to be used.
"""
