"""Attention with tasks, foresight, segments and memory.

Importing ``memattn`` loads torch only; Triton, transformers and the command line load on first use.
"""

from memattn.ops import AttentionOutput, segmented_attention

__version__ = "0.1.0"

__all__ = ["AttentionOutput", "__version__", "segmented_attention"]
