"""What methods learn from a model's own states on a few documents."""
