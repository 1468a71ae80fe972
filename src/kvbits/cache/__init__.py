"""The cache: packed layers, their place inside a transformers cache, and files of saved caches."""
