"""A small model that has learned to remember facts, in seconds: for tests of memories."""

import random

import torch
from torch.nn import functional as F

from memattn.data import load_tokenizer
from memattn.models import MemAttnConfig, MemAttnForCausalLM

THINGS, NUMBERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"


def draw_facts(generator, n):
    """``n`` things, each with a number."""
    return {thing: generator.choice(NUMBERS) for thing in generator.sample(THINGS, n)}


def draw_text(generator, length, n=6):
    """Facts such as ``B7``, then dots and the same facts again, and which letters are answers."""
    facts = draw_facts(generator, n)
    text = "".join(thing + number for thing, number in facts.items())
    is_answer = [False] * len(text)
    while len(text) < length:
        dots = generator.choice((3, 12)) if generator.random() < 0.2 else 0
        thing = generator.choice(list(facts))
        text += "." * dots + thing + facts[thing]
        is_answer += [False] * (dots + 1) + [True]
    return text[:length], is_answer[:length]


def train_on_facts(folder, *, steps=160, batch_size=16, length=48):
    """Train a memory without attention on such texts, and save it with its tokenizer."""
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    config = MemAttnConfig.titans(
        variant="lmm",
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=128,
        initializer_range=0.2,
        memory_depth=1,
        chunk_size=2,
        num_persistent_tokens=0,
        lr=0.5,
        momentum=None,
        decay=None,
    )
    model = MemAttnForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.95))
    generator = random.Random(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        drawn = [draw_text(generator, length) for _ in range(batch_size)]
        ids = torch.tensor([tokenizer(text)["input_ids"] for text, _ in drawn])
        wanted = torch.tensor([is_answer for _, is_answer in drawn])[:, 1:]
        logits = model(ids, use_cache=False).logits[:, :-1][wanted]
        loss = F.cross_entropy(logits, ids[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer
