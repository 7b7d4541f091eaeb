"""Counted words and pairs of the same text, which every language model of the demo must beat."""

from typing import Any

from rich.console import Console

from memattn.demo.config import DemoConfig
from memattn.evaluate import bits_per_byte, ngram_losses
from memattn.train import ModelConfig, TrainConfig
from memattn.train.setup import prepare_data


def measure_yardsticks(
    config: DemoConfig, num_tokens: int, console: Console
) -> list[dict[str, Any]]:
    """Bits per byte of the unigram and the bigram, and of those of a vocabulary twice as large.

    Args:
        config: The demo.
        num_tokens: Tokens that each model is trained on. As many are counted, or all that there
            are; of the larger vocabulary, the same share of the text.
        console: Where to show what is counted.
    """
    share = 1.0
    found = []
    for vocab_size in (config.vocab_size, 2 * config.vocab_size):
        with console.status(f"counting pairs of {vocab_size:,} tokens"):
            data = config.data(config.corpus, vocab_size)
            # the sizes of the model do not matter here
            corpus = prepare_data(TrainConfig(model=ModelConfig(preset="vanilla"), data=data))
            held_out = corpus.held_out
            assert held_out is not None
            size = max(vocab_size, len(corpus.tokenizer))
            ids = corpus.train.ids
            if vocab_size == config.vocab_size:
                share = min(1.0, num_tokens / len(ids))
            counted = ids[: round(share * len(ids))]
            losses = ngram_losses(counted, held_out.ids, size)
        for name, loss in losses._asdict().items():
            bits = bits_per_byte(loss, len(held_out.ids), held_out.num_bytes)
            values = {"vocab_size": vocab_size, "tokens": len(counted), "bits_per_byte": bits}
            found.append({"name": name, **values})
    return found
