"""The definitions of the operators in plain PyTorch: exact, differentiable, O(T * S) memory."""
