"""Speed and memory, measured: kernels, decode loops, largest batches; records and figures."""
