"""Tiny decoders with open specialists that differ from the base."""

import torch
from model_factories import SIZES, make_config, perturb

from memattn.models import MemAttnForCausalLM
from memattn.nn.causal_specialists import CausalSpecialists

CHAPTERS = dict(
    kind="chapter_memory",
    num_memory_tokens=8,
    use_chapters=True,
    num_chapters=4,
    top_k_chapters=2,
    routing_block_size=4,
    wo_init_zero=False,
)
# decoder around the specialists, and their fields
SHIFTABLE = {
    "prefix": ("vanilla", dict(scope="prefix", activation="sigmoid", top_k=1)),
    "token": ("both", dict(rank=2, temperature=0.5)),
    "future": ("future", dict(scope="prefix", rank=3)),
}


def specialists_part(**fields):
    return dict(kind="specialists", gate_size=4, prior=1.0, num_specialists=2) | fields


def make_shiftable(system="prefix", dtype=torch.float64, parts=(), sizes=None, **fields):
    """A decoder whose every parameter is random; ``fields`` are the specialists'."""
    base, own = SHIFTABLE[system]
    config = make_config(base, parts=[*parts, specialists_part(**own | fields)], **(sizes or {}))
    torch.manual_seed(0)
    return perturb(MemAttnForCausalLM(config).to(dtype).eval())


def without_specialists(model):
    """The same model without the part."""
    config = type(model.config).from_dict({**model.config.to_dict(), "parts": []})
    plain = MemAttnForCausalLM(config).to(model.dtype).eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    return plain


def modules_of(model):
    return [module for module in model.modules() if isinstance(module, CausalSpecialists)]


def set_priors(model, prior):
    for module in modules_of(model):
        for name in module.gate.specialists:
            module.gate.set_prior(name, prior)
    return model


__all__ = ["CHAPTERS", "SHIFTABLE", "SIZES"]
