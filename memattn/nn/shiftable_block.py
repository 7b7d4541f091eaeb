"""PyTorch's encoder layer with gated specialists for its attention."""

from typing import Any

import torch
from torch import Tensor, nn

from memattn.checks import check_bool, check_int, must
from memattn.nn.domain_gate import DomainGate, GateOutput
from memattn.nn.shiftable_attention import ShiftableMultiheadAttention, check_base

# the attribute of nn.MultiheadAttention that says whether query, key and value are equally wide
_SAME_WIDTHS = "_qkv_same_embed_dim"


class ShiftableTransformerBlock(nn.TransformerEncoderLayer):
    """An encoder layer around a frozen attention, or a whole frozen layer, with N specialists.

    It is called like ``nn.TransformerEncoderLayer`` and can be used in ``nn.TransformerEncoder``.
    If no specialist is open, or if ``domain_weights`` choose the base for all tokens, the layer's
    own forward runs, including PyTorch's fast path; so the output is exactly that of the wrapped
    layer. If a specialist is open, the fast path is not used, and tokens that use only the base get
    exactly the output of the layer without fast path.

    Args:
        d_model: Features, those of the base.
        num_heads: Heads, those of the base.
        dim_feedforward: Hidden features of the MLP, those of a base that is a layer.
        base_mha: An ``nn.MultiheadAttention``, around which a new MLP and new norms are trained, or
            an ``nn.TransformerEncoderLayer``, all of which is frozen and has no dropout. It is used
            itself, not a copy.
        num_specialists: Initial number of specialists; ``self_attn`` can add more.
        dropout: Dropout of new parts, 0.1 if None; None with a layer.
        norm_first: Whether norms of new parts come before attention and MLP, False if None; None
            with a layer.
        rank: Rank of new specialists' change of the base's weights; None: full weights.
        gate: A gate for ``d_model`` features without specialists; None means one by token.
        backend: Backend of ``branch_attention``.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If the base's width, heads or hidden features differ.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> block = ShiftableTransformerBlock(16, 2, 32, base_mha=layer, num_specialists=3)
        >>> block(torch.randn(4, 5, 16)).shape
        torch.Size([4, 5, 16])
    """

    self_attn: ShiftableMultiheadAttention  # type: ignore[assignment]
    _layer: nn.TransformerEncoderLayer

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dim_feedforward: int = 2048,
        base_mha: nn.MultiheadAttention | nn.TransformerEncoderLayer | None = None,
        num_specialists: int = 0,
        *,
        dropout: float | None = None,
        norm_first: bool | None = None,
        rank: int | None = None,
        gate: DomainGate | None = None,
        backend: str = "auto",
    ) -> None:
        nn.Module.__init__(self)
        check_int("dim_feedforward", dim_feedforward, 1)
        is_layer = isinstance(base_mha, nn.TransformerEncoderLayer)
        if is_layer:
            layer = base_mha
            for name, given in (("dropout", dropout), ("norm_first", norm_first)):
                if given is not None:
                    must(name, "be None where base_mha is a layer", given)
            if isinstance(layer, ShiftableTransformerBlock):
                must("base_mha", "be a layer without specialists", type(layer).__name__, TypeError)
            check_base("base_mha.self_attn", layer.self_attn, d_model, num_heads)
            if layer.linear1.out_features != dim_feedforward:
                wanted = f"have dim_feedforward={dim_feedforward}"
                must("base_mha", wanted, layer.linear1.out_features)
            layer.requires_grad_(False).eval()
        else:
            check_base("base_mha", base_mha, d_model, num_heads)
            assert isinstance(base_mha, nn.MultiheadAttention)
            weight = base_mha.out_proj.weight
            layer = nn.TransformerEncoderLayer(
                *(d_model, num_heads, dim_feedforward, 0.1 if dropout is None else dropout),
                batch_first=base_mha.batch_first,
                norm_first=bool(norm_first),
                device=weight.device,
                dtype=weight.dtype,
            )
            layer.self_attn = base_mha
        self.base_is_layer = is_layer
        self.__dict__["_layer"] = (
            layer  # not registered: its modules are already modules of the block
        )
        attention = layer.self_attn
        assert isinstance(attention, nn.MultiheadAttention)
        self.self_attn = ShiftableMultiheadAttention(
            *(d_model, num_heads, attention, num_specialists), rank=rank, gate=gate, backend=backend
        )
        # nn.TransformerEncoder asks whether its fast path may be used; the block decides that
        # itself
        setattr(self.self_attn, _SAME_WIDTHS, getattr(attention, _SAME_WIDTHS))
        for name, module in layer.named_children():
            if name != "self_attn":
                setattr(self, name, module)
        self.activation = layer.activation
        self.activation_relu_or_gelu = layer.activation_relu_or_gelu
        self.norm_first = layer.norm_first
        self.train(self.training)

    @classmethod
    def from_layer(
        cls,
        layer: nn.TransformerEncoderLayer,
        num_specialists: int = 0,
        *,
        rank: int | None = None,
        gate: DomainGate | None = None,
        backend: str = "auto",
    ) -> "ShiftableTransformerBlock":
        """A block around a layer, with the layer's sizes."""
        attention, hidden = layer.self_attn, layer.linear1.out_features
        return cls(
            *(attention.embed_dim, attention.num_heads, hidden, layer, num_specialists),
            rank=rank,
            gate=gate,
            backend=backend,
        )

    def train(self, mode: bool = True) -> "ShiftableTransformerBlock":
        super().train(mode)
        if self.base_is_layer:
            self._layer.eval()
        else:
            self._layer.training = mode
        return self

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        domain_prior: Tensor | None = None,
        domain_mask: Tensor | None = None,
        domain_weights: Tensor | None = None,
        return_gates: bool = False,
    ) -> Any:
        """Call it like ``nn.TransformerEncoderLayer``.

        Args:
            src: ``[B, T, E]``, or ``[T, B, E]`` where the base is not batch first, or ``[T, E]``;
                or nested, as ``nn.TransformerEncoder`` makes it.
            src_mask: ``[T, T]`` or ``[B * H, T, T]``: True hides, numbers are added to scores.
            src_key_padding_mask: ``[B, T]``, the same for keys.
            is_causal: A hint that ``src_mask`` is causal.
            domain_prior: ``prior`` of the ``DomainGate``.
            domain_mask: Its ``mask``.
            domain_weights: Its ``override``.
            return_gates: Whether to also return the gates.

        Returns:
            The output, with the shape of ``src``; with ``return_gates``, also a ``GateOutput``.

        Raises:
            TypeError: If an argument has the wrong Python type.
            ValueError: If an argument does not fit.
        """
        check_bool("return_gates", return_gates)
        domain = dict(
            domain_prior=domain_prior, domain_mask=domain_mask, domain_weights=domain_weights
        )
        masks = dict(
            src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
        )
        given = any(x is not None for x in domain.values())
        used = self.self_attn.used_specialists(domain_prior, domain_weights)
        # nested tensors are supported by the fast path only
        is_slow = src.is_nested and torch.is_grad_enabled() and src.requires_grad
        if src.is_nested and (used or given or return_gates or is_slow):
            return self._forward_nested(src, domain, return_gates)
        gates = None
        if not used:
            if given or return_gates:
                x = self.norm1(src) if self.norm_first else src
                gates = self.self_attn.gates_of(
                    x, src_key_padding_mask, src_mask, is_causal, **domain
                )
            out = self._layer(src, **masks)
        elif self.norm_first:
            shifted, gates = self._attend(self.norm1(src), masks, domain)
            out = src + shifted
            out = out + self._ff_block(self.norm2(out))
        else:
            shifted, gates = self._attend(src, masks, domain)
            out = self.norm1(src + shifted)
            out = self.norm2(out + self._ff_block(out))
        return (out, gates) if return_gates else out

    def _attend(
        self, x: Tensor, masks: dict[str, Any], domain: dict[str, Any]
    ) -> tuple[Tensor, GateOutput]:
        out, _, gates = self.self_attn(
            *(x, x, x),
            attn_mask=masks["src_mask"],
            key_padding_mask=masks["src_key_padding_mask"],
            is_causal=masks["is_causal"],
            need_weights=False,
            return_gates=True,
            **domain,
        )
        return self.dropout1(out), gates

    def _forward_nested(self, src: Tensor, domain: dict[str, Any], return_gates: bool) -> Any:
        """Forward of nested sequences of different lengths; pads them on the right meanwhile."""
        lengths = torch.tensor([len(sequence) for sequence in src.unbind()], device=src.device)
        padded = src.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1], device=src.device) >= lengths[:, None]
        out, gates = self(padded, src_key_padding_mask=padding, return_gates=True, **domain)
        out = torch._nested_tensor_from_mask(out, ~padding, mask_check=False)  # type: ignore[attr]
        return (out, gates) if return_gates else out
