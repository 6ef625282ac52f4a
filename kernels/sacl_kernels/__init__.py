"""Triton kernels and their launchers, one file an operator.

A launcher takes and returns tensors and knows nothing of autograd, dispatch or configuration:
those are `sacl_fast.ops`. This package imports torch and triton and never sacl_fast, so that it
can be used on its own.
"""
