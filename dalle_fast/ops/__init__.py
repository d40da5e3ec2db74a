"""The public operations: argument checks, choice of backend, registration with torch.library, autograd.

The only door to ``dalle_fast.kernels`` and ``dalle_fast._C``; one module an operation.
"""
