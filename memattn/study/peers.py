"""Models of transformers with new weights and a given number of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memattn.checks import must
from memattn.files import replacing


@dataclass(frozen=True, kw_only=True)
class PeerSizes:
    """The sizes that a peer shares with our models in the comparison.

    Attributes:
        hidden_size: Features of the hidden states.
        num_layers: Layers of ours, each of attention and MLP.
        num_heads: Heads.
        head_dim: Features of a head.
        seq_len: Tokens in a row.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    seq_len: int


def peer_config(name: str, sizes: PeerSizes, target: int, tokenizer: Any) -> Any:
    """The configuration of a peer whose number of parameters is nearest to a target.

    Args:
        name: A key of ``PEERS``.
        sizes: The sizes that it shares with the others.
        target: Number of parameters to approach.
        tokenizer: Gives the size of the vocabulary and the special tokens.

    Raises:
        ValueError: If it cannot be that small.
    """
    names = ("bos", "eos", "pad")
    shared = {f"{special}_token_id": getattr(tokenizer, f"{special}_token_id") for special in names}
    shared |= {"vocab_size": len(tokenizer), "hidden_size": sizes.hidden_size}
    return PEERS[name](sizes, target, {**shared, "tie_word_embeddings": True})


def _qwen3_next(sizes: PeerSizes, target: int, shared: dict[str, Any]) -> Any:
    """Qwen3-Next with dense MLPs, whose width is chosen: three gated delta rules to one attention.

    Few experts of few parameters would be no mixture.
    """
    from transformers import Qwen3NextConfig

    from memattn.study.widths import equal_width

    heads: dict[str, Any] = dict(
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        linear_num_key_heads=sizes.num_heads,
        linear_num_value_heads=sizes.num_heads,
        linear_key_head_dim=sizes.head_dim,
        linear_value_head_dim=sizes.head_dim,
    )

    kinds = [
        "full_attention" if i % 4 == 3 else "linear_attention" for i in range(sizes.num_layers)
    ]
    if sizes.num_layers < 4:
        kinds[-1] = "full_attention"

    def make(width: int) -> Any:
        return Qwen3NextConfig(
            **shared,
            **heads,
            layer_types=kinds,
            num_hidden_layers=sizes.num_layers,
            intermediate_size=width,
            mlp_only_layers=list(range(sizes.num_layers)),
            max_position_embeddings=max(4096, sizes.seq_len),
        )

    count = lambda width: count_parameters(make(width))
    return make(equal_width("qwen3-next", count, target, "parameters"))


def _mamba2(sizes: PeerSizes, target: int, shared: dict[str, Any]) -> Any:
    """Mamba2, of which layers, expansion and state are chosen; its layers have no MLP.

    Two to four layers stand for one of ours, twice to four times as wide inside.
    """
    from transformers import Mamba2Config

    def make(num_layers: int, expand: int, state: int) -> Any:
        inner = expand * sizes.hidden_size
        # heads must divide what is inside
        head_dim = next(d for d in range(min(sizes.head_dim, inner), 0, -1) if inner % d == 0)
        return Mamba2Config(
            **shared,
            num_hidden_layers=num_layers,
            expand=expand,
            num_heads=inner // head_dim,
            head_dim=head_dim,
            state_size=state,
            n_groups=1,
            chunk_size=64,
        )

    found = []
    for expand in (1, 2, 3, 4):
        # linear in the layers, and in the state for each of them
        empty, one = (count_parameters(make(n, expand, 16)) for n in (0, 1))
        each_state = (count_parameters(make(1, expand, 32)) - one) / 16
        for num_layers in range(1, 4 * sizes.num_layers + 1):
            left = target - empty - num_layers * (one - empty)
            state = 16 + round(left / (num_layers * each_state) / 16) * 16
            if 16 <= state <= 256:
                error = abs(left - num_layers * each_state * (state - 16))
                usual = abs(num_layers - 2 * sizes.num_layers) + abs(expand - 2)
                found.append((error > 0.01 * target, usual, error, num_layers, expand, state))
    if not found or min(found)[0]:
        must("models", f"have room for mamba2 at {target:,} parameters", "sizes without")
    return make(*min(found)[3:])


PEERS: dict[str, Callable[[PeerSizes, int, dict[str, Any]], Any]] = {
    "mamba2": _mamba2,
    "qwen3-next": _qwen3_next,
}


def count_parameters(config: Any) -> int:
    """Parameters of the model of a configuration of transformers, which is not allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def write_new_model(config: Any, seed: int, folder: Path) -> None:
    """Write a model with new weights for ``from_pretrained``, in one step."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # there is one for each file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
