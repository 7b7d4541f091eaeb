"""Training and generation of whole models, compared with transformers' Llama (same weights)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from memattn.bench.bars import Bar, PeerPeakBar, SpeedBar
from memattn.bench.case import Case, Forward, Peer
from memattn.bench.limits import SAME_LOOP, SAME_PRODUCTS, SAME_PROMPT
from memattn.bench.roofline import Work

LLAMA = "llama, sdpa"
COMPILED = "memattn, compiled"
TRAINING = "forward+backward"
WINDOW = 128  # the segment of the segmented model too
FUTURE_DIM = 64


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """One decoder: rotary positions, RMS norms, SwiGLU, tied embeddings.

    Training: the loss of ``B`` rows of ``T`` tokens and the gradients of all weights. Generation:
    ``new`` greedy tokens after a prompt of ``T`` tokens; the time includes prefill.
    """

    operator: ClassVar[str] = "models"
    kinds: ClassVar[dict[str, str]] = {
        "causal": "training with causal attention",
        "segmented": "training with segments and a window; Llama attends causally",
        "generate": "greedy generation with causal attention",
        "generate-future": "greedy generation with future attention; Llama attends causally",
    }
    quick_kinds: ClassVar[tuple[str, ...]] = ("generate",)
    cuda_sizes: ClassVar[dict[str, int]] = {}

    B: int = 1
    layers: int = 6
    hidden: int = 256
    H: int = 4
    vocabulary: int = 4096
    new: int = 64

    @property
    def generates(self) -> bool:
        return self.kind.startswith("generate")

    @property
    def is_yardstick(self) -> bool:
        """Whether Llama computes something else."""
        return self.kind in ("segmented", "generate-future")

    def model(self, backend: str) -> Any:
        """Our model with random weights of the case's seed."""
        from memattn.models import MemAttnConfig, MemAttnForCausalLM

        sizes: dict[str, Any] = dict(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.H,
            max_position_embeddings=self.T + self.new + FUTURE_DIM,
            backend=backend,
        )
        if self.kind == "segmented":
            spans = dict(segment_len=WINDOW, window_size=WINDOW)
            config = MemAttnConfig.segmented(**sizes, **spans, num_persistent_tokens=0)
        elif self.kind == "generate-future":
            config = MemAttnConfig.future(**sizes, future_dim=FUTURE_DIM, loss_type=None)
        else:
            config = MemAttnConfig.vanilla(**sizes)
        return self._drawn(MemAttnForCausalLM(config))

    def _drawn(self, model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        for (
            parameter
        ) in model.parameters():  # the usual scale 0.02 would make all logits nearly equal
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            # exact in every dtype
            drawn = (drawn * scale + (parameter.dim() == 1)).to(torch.bfloat16)
            parameter.data = drawn.to(self.device, self.dtype)
        return model.train(not self.generates)

    def llama(self) -> Any:
        """Llama of the same sizes with the weights of our model."""
        from transformers import LlamaConfig, LlamaForCausalLM

        ours = self.model("auto")
        config: Any = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=ours.config.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.H,
            max_position_embeddings=self.T + self.new + FUTURE_DIM,
            rms_norm_eps=ours.config.rms_norm_eps,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = "sdpa"
        model: Any = LlamaForCausalLM(config)
        model.to(self.device, self.dtype).train(not self.generates)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(ours.get_parameter(_our_name(name)))
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Token ids, and the weights by our names (generation uses equal weights of its own)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.B, self.T)
        ids = torch.randint(self.vocabulary, shape, generator=generator).to(self.device)
        weights = dict(self.model("auto").named_parameters())
        return {"input_ids": ids} | {name: x.detach() for name, x in weights.items()}

    def subject(self, backend: str) -> Forward:
        model = self.model(backend)
        return self._generate(model) if self.generates else self._trained(model, _same_name)

    def checked(self, backend: str) -> Forward:
        """The loss; for generation, prompt logits with the second half decoded token by token."""
        if not self.generates:
            return self.subject(backend)
        model = self.model(backend)

        def decode(inputs: dict[str, Tensor]) -> Tensor:
            ids = inputs["input_ids"]
            first = model(ids[:, : self.T // 2], use_cache=True)
            cache, found = first.past_key_values, [first.logits]
            for token in ids[:, self.T // 2 :].split(1, 1):
                found.append(model(token, past_key_values=cache).logits)
            return torch.cat(found, 1)[:, None]

        return decode

    def definition(self, rows: slice) -> Forward:
        module = self.model("reference")
        if not self.generates:
            loss = self._trained(module, _same_name, plain=True)
            return lambda inputs: loss(inputs)[:, :, rows]
        return lambda inputs: _logits(module, _same_name, inputs)[:, None, rows]

    def rows_are_independent(self) -> bool:
        """The loss of training is a mean over all rows."""
        return self.generates

    def is_checked_short(self) -> bool:
        return True

    def _trained(self, model: Any, name_of: Any, *, plain: bool = False) -> Forward:
        """The loss, expanded to rows as ``result_check`` slices them."""

        def loss(inputs: dict[str, Tensor]) -> Tensor:
            ids = inputs["input_ids"]
            return _loss(model, name_of, inputs, plain=plain).expand(len(ids), 1, ids.shape[1], 1)

        return loss

    def _generate(self, model: Any) -> Forward:
        options = {"max_new_tokens": self.new, "do_sample": False}
        return lambda inputs: model.generate(inputs["input_ids"], **options)

    def has(self, direction: str) -> bool:
        return direction == ("forward" if self.generates else TRAINING)

    def peers(self) -> dict[str, Peer]:
        # tokens are not compared; ``checked`` compares decoded logits
        tokens = self.work() if self.generates else None
        llama = self.work() if self.is_yardstick else tokens
        peers = {
            LLAMA: Peer(self._peer, yardstick=llama),
            "naive": Peer(self._naive, self._score_bytes(), yardstick=tokens),
        }
        if not self.generates:
            peers[COMPILED] = Peer(self._compiled, compiled=True)
        return peers

    def _peer(self) -> Forward:
        model = self.llama()
        return self._generate(model) if self.generates else self._trained(model, _our_name)

    def _compiled(self) -> Forward:
        """Ours as one program, as ``training.compile`` makes it."""
        model = self.model("auto")
        model.compile(fullgraph=True)
        return self._trained(model, _same_name)

    def _naive(self) -> Forward:
        model = self.model("reference")
        return (
            self._generate(model)
            if self.generates
            else self._trained(model, _same_name, plain=True)
        )

    def _score_bytes(self) -> int:
        """Bytes of scores: of one layer in generation, of all layers in training."""
        kept = 1 if self.generates else 2 * self.layers
        return kept * self.B * self.H * self.T**2 * self.dtype.itemsize

    def work(self) -> dict[str, Work]:
        """Products with the weights, and attention to the allowed pairs."""
        sizes = self.hidden * (4 * self.hidden + 3 * _mlp_width(self.hidden))
        head = self.hidden * self.vocabulary
        weights = self.layers * sizes + head
        tokens = self.B * (self.T + self.new if self.generates else self.T)
        length = self.T + self.new if self.generates else self.T
        pairs = tokens * (min(length, WINDOW) if self.kind == "segmented" else length / 2)
        flops = 2 * tokens * weights + int(4 * self.layers * self.hidden * pairs)
        moved = 4 * weights * (self.new if self.generates else 1)
        forward = Work(flops, tokens * self.vocabulary, moved)
        return {"forward": forward, "backward": Work(2 * flops, forward.exps, 2 * moved)}

    def label(self, T: str | None = None) -> str:
        length = f"T={self.T}" if T is None else T
        after = f" +{self.new}" if self.generates else ""
        return f"{self.kind} B={self.B} {length}{after}"

    def tokens(self) -> int:
        return self.B * (self.new if self.generates else self.T)

    @classmethod
    def bars(cls, suite: str) -> Sequence[Bar]:
        if suite != "cpu-bars":
            return []
        made: list[Bar] = []
        for kind, B, T, target in (
            ("causal", 8, 512, 1.35),
            ("causal", 1, 4096, 1.5),
            ("segmented", 1, 4096, 2.3),
        ):
            case = cls(kind=kind, B=B, T=T)
            on: Any = dict(case=case, direction=TRAINING, against=(LLAMA,))
            made.append(SpeedBar(**on, target=target, limited_by=SAME_PRODUCTS))
            made.append(PeerPeakBar(**on | {"against": LLAMA}, target=0.6))
        for kind in ("generate", "generate-future"):
            for T in (16, 1024):
                on = dict(case=cls(kind=kind, T=T), direction="forward", against=(LLAMA,))
                reason = SAME_PROMPT if T > 16 else SAME_LOOP
                made.append(SpeedBar(**on, target=2.5, limited_by=reason))
        return made


def _logits(model: nn.Module, name_of: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """The loss (with labels) or the logits of a model with the weights in ``inputs``."""
    weights = {n: inputs[name_of(n)] for n, _ in model.named_parameters()}
    options |= {"input_ids": inputs["input_ids"], "use_cache": False}
    found = functional_call(model, weights, (), options)
    return found.logits if found.loss is None else found.loss


def _loss(
    model: nn.Module, name_of: Any, inputs: dict[str, Tensor], *, plain: bool = False
) -> Tensor:
    """Next-token cross-entropy, for our model without materialised logits, as in training.

    ``plain``: PyTorch's cross-entropy of the logits.
    """
    from memattn.models import MemAttnForCausalLM

    ids = inputs["input_ids"]
    if not plain:
        skip = {"skip_logits": True} if isinstance(model, MemAttnForCausalLM) else {}
        return _logits(model, name_of, inputs, labels=ids, **skip)
    logits = _logits(model, name_of, inputs)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _same_name(name: str) -> str:
    return name


def _our_name(name: str) -> str:
    """The name of one of Llama's weights in our model."""
    for theirs, ours in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("self_attn", "attention"),
    ):
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def _mlp_width(hidden: int) -> int:
    """Features inside the MLP."""
    return -(-8 * hidden // (3 * 64)) * 64


CASE = ModelCase
