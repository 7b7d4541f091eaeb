"""Future attention and its loss, forward and backward.

The definition is memattn.reference.future_attention. A query sees one interval of token keys and
one of the table's rows, and what sees a key or a row is one interval of queries, so both
directions walk only tiles that hold an allowed pair (see ``intervals``).
"""

from memattn_kernels.future_attention.backward import future_attention_backward_op
from memattn_kernels.future_attention.forward import (
    future_attention,
    future_attention_loss,
    future_attention_op,
)

__all__ = [
    "future_attention",
    "future_attention_backward_op",
    "future_attention_loss",
    "future_attention_op",
]
