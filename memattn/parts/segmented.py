"""Segmented attention: a token sees its own segment and a sliding window."""

from dataclasses import dataclass
from typing import ClassVar

from memattn.checks import check_int, must
from memattn.parts.base import Sizes, register_part
from memattn.parts.causal import CausalConfig
from memattn.parts.sink_state import SinkState
from memattn.parts.state import PartState


@register_part
@dataclass(frozen=True, kw_only=True)
class SegmentedConfig(CausalConfig):
    """A token sees the tokens of its own segment and of the sliding window.

    Attributes:
        segment_len: Tokens in a segment; None means no segments.
        window_size: Keys in the sliding window, the query's own included; None means no window.
            At least one of segment and window is given.
        num_sink_tokens: First tokens of each sequence that all its tokens see.
        num_persistent_tokens: Learned keys and values that every token sees.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"``, ``"reference"`` or
            ``"flex"``.
    """

    kind: ClassVar[str] = "segmented"
    state_type: ClassVar[type[PartState]] = SinkState

    segment_len: int | None = None
    window_size: int | None = None
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("segment_len", "window_size"):
            if getattr(self, name) is not None:
                check_int(f"attention.{name}", getattr(self, name), 1)
        check_int("attention.num_sink_tokens", self.num_sink_tokens, 0)
        if self.segment_len is None and self.window_size is None:
            must("attention.segment_len", 'be given for kind "segmented", or window_size', None)

    @property
    def spans(self) -> tuple[int | None, int | None]:
        return self.segment_len, self.window_size

    @property
    def reach(self) -> int:
        return max(self.segment_len or 0, self.window_size or 0)

    def visible(self, position: int, sizes: Sizes) -> int:
        own_segment = position % self.segment_len + 1 if self.segment_len else 0
        near = max(own_segment, min(position + 1, self.window_size or 0))
        near += min(self.num_sink_tokens, position + 1 - near)
        return near + self.num_persistent_tokens

    @property
    def sinks(self) -> int:
        return self.num_sink_tokens

    def new_state(self) -> PartState:
        return SinkState(self.kind, *self.spans, self.num_sink_tokens)
