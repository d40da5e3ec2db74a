"""Triton kernels, installed as ``dalle_fast.kernels``: they know torch, triton and each other. None in this version."""
