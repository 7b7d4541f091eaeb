"""Operators of the C++ extension ``memattn._C``, registered with PyTorch."""
