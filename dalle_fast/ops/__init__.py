"""The public operations: they check arguments and choose the backend.

The only door to ``dalle_fast.kernels`` and ``dalle_fast._C``; one module an operation.
"""
