"""Triton kernels.

Names follow one scheme: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_``
what a program holds; capitals are compile-time constants or tensors in memory.
"""
