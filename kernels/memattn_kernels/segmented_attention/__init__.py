"""Segmented sliding-window attention with persistent and memory keys, forward and backward.

The definition is memattn.reference.segmented_attention. What a query may see is one interval of
columns in each of three key sources, and what sees a key is one interval of queries, so both
directions walk only tiles that hold an allowed pair (see ``intervals``).
"""

from memattn_kernels.segmented_attention.backward import segmented_attention_backward_op
from memattn_kernels.segmented_attention.forward import segmented_attention, segmented_attention_op

__all__ = ["segmented_attention", "segmented_attention_backward_op", "segmented_attention_op"]
