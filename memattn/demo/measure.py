"""What the demo measures of a model: exactness, state, influence, a sample."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memattn.evaluate import audit

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
        "influence": influence(model, seed=seed),
        "prompt": PROMPT,
        "sample": sample(model, tokenizer, PROMPT, seed=seed),
    }


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
def influence(
    model: Any, *, seq_len: int = 384, stride: int = 8, seed: int = 0
) -> dict[str, list[Any]]:
    """How much a change of one token moves the logits at every position.

    Every ``stride``-th token is changed alone, one in each row of a batch.

    Returns:
        ``changed`` ``[n]``, the positions changed, and ``log10`` ``[n, seq_len / stride]``, the
        logarithm of the mean absolute change of the logits, averaged over blocks of ``stride``
        positions; None where no logit changed at all.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.vocab_size
    ids = torch.randint(vocab_size, (1, seq_len), generator=generator)
    changed = list(range(0, seq_len, stride))
    rows = ids.repeat(len(changed), 1)
    for row, position in enumerate(changed):
        rows[row, position] = (rows[row, position] + 1 + row) % vocab_size
    # row by row, in the shape of the unchanged one, so that what is not reached is exactly 0
    before = model(ids.to(model.device)).logits
    changes = [
        (model(row.to(model.device)).logits - before).abs().mean(-1)[0] for row in rows.split(1)
    ]
    blocks = torch.stack(changes).double().cpu().unflatten(1, (-1, stride)).mean(-1)
    return {"changed": changed, "log10": _log10(blocks)}


def _log10(values: Tensor) -> list[list[float | None]]:
    """Logarithms, None for exactly 0."""
    return [
        [None if value == 0.0 else round(float(torch.tensor(value).log10()), 3) for value in row]
        for row in values.tolist()
    ]


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
