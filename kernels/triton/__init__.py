"""Triton kernels, one file an operator; installed as `genrep_fast.kernels`."""
