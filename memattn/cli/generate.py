"""``memattn generate``."""

from typing import Any


def generate(
    model: str | None = None,
    config: str | None = None,
    base_model: str | None = None,
    prompt: str = "-",
    memory: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    device: str | None = None,
) -> int:
    """Continue a text.

    Tokens are drawn one by one with the model's cache and printed at once, until the model ends the
    text or max_new_tokens is reached.

    Args:
        model: A folder with a saved model and its tokenizer, a run folder, or a name on the
            Hugging Face hub.
        config: Configuration of a training run, instead of a model: its trained model or, before
            training, its initial model.
        base_model: Folder of the pretrained model, instead of the one in the configuration.
        prompt: The text to continue; by default the standard input.
        memory: A file that memattn memorize wrote for this model: the text continues the one read
            there.
        max_new_tokens: Largest number of tokens to add.
        temperature: Sampling temperature; 0 always takes the most likely token.
        top_k: Sample from this many most likely tokens; 0 means all.
        top_p: Sample from the most likely tokens that have this share of the probability.
        seed: Seed of the sampling.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
    """
    import sys

    import torch
    from transformers import TextStreamer

    from memattn.cli._runs import load_either

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    _, loaded, tokenizer, _ = load_either(model, config, base_model, device)
    text = sys.stdin.read() if prompt == "-" else prompt
    past: dict[str, Any] = {}
    num_read = 0
    if memory is not None:
        from memattn.models import KeptMemory

        kept = KeptMemory.load(memory, loaded)
        past, num_read = {"past_key_values": kept.cache}, kept.num_tokens
    begins = memory is None and tokenizer.bos_token_id is not None
    first = [tokenizer.bos_token_id] if begins else []
    ids = torch.tensor([first + tokenizer(text, add_special_tokens=False)["input_ids"]])
    if ids.numel() == 0:
        raise ValueError("prompt must have at least one token, got none")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0.0:
        sampling = dict(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.manual_seed(seed)
    with torch.inference_mode():
        loaded.generate(
            ids.to(loaded.device),
            # its length tells generate() that the tokens of the state are not in input_ids
            attention_mask=ids.new_ones(1, num_read + ids.shape[1]).to(loaded.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
            **past,
        )
    return 0
