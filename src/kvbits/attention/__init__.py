"""Attention over packed states: views of them, the reference, the seam to transformers."""
