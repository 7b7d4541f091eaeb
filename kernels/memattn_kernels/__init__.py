"""Triton kernels of memattn: tensors in, tensors out, no models."""
