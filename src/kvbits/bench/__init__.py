"""Speed and memory, measured: kernels, whole decode loops, largest batches; records and figures."""
