"""Tensors in, tensors out: Triton kernels, their plain-torch reference and the dispatch between them."""
