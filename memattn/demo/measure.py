"""What the demo measures of a model: exactness, state, influence, a sample."""

from pathlib import Path
from typing import Any

import torch

from memattn.evaluate import audit, influence

STATE_LENGTHS = (128, 256, 512, 768, 1024, 1536, 2048)
PROMPT = "The city is"


def measure_model(folder: Path, *, seed: int) -> dict[str, Any]:
    """Parameters, audit, growth of the state, influence of tokens and a sample of a saved model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.to(_device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "audit": audit(model, seed=seed).to_dict(),
        "state_bytes": state_bytes(model),
        "influence": influence(model, _random_ids(model, seed), stride=8),
        "prompt": PROMPT,
        "sample": sample(model, tokenizer, PROMPT, seed=seed),
    }


def _random_ids(model: Any, seed: int) -> torch.Tensor:
    """Random tokens, ``[1, 384]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, 384), generator=generator)


@torch.no_grad()
def state_bytes(model: Any) -> list[tuple[int, int]]:
    """Bytes that one sequence carries after some numbers of tokens, as ``(tokens, bytes)``."""
    ids = torch.randint(model.config.vocab_size, (1, STATE_LENGTHS[-1]), device=model.device)
    cache, begin, points = None, 0, []
    for end in STATE_LENGTHS:
        # the last token alone, as decoding leaves the state
        for piece in (ids[:, begin : end - 1], ids[:, end - 1 : end]):
            cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
        begin = end
        points.append((end, cache.nbytes))
    return points


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, *, seed: int, num_tokens: int = 60) -> str:
    """A continuation of the prompt, without it."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([first + tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    torch.manual_seed(seed)
    tokens = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=0,
        top_p=0.9,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
