"""One decoder with a memory as context, chapters and two specialists, from a configuration."""

import pytest
import torch
from model_factories import SIZES, logits_of, make_tokens, perturb
from specialist_factories import CHAPTERS, specialists_part

from memattn.evaluate import audit
from memattn.models import MemAttnCache, MemAttnConfig, MemAttnForCausalLM

MAC = dict(
    kind="titans",
    variant="mac",
    segment_len=4,
    chunk_size=4,
    memory_depth=1,
    num_persistent_tokens=1,
    conv_size=2,
)
PARTS = (
    CHAPTERS | dict(load_balance_coefficient=1.0),
    specialists_part(scope="prefix", top_k=1, activation="sigmoid", entropy_coefficient=1.0),
)


def make_composed(attention=MAC, parts=PARTS, dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    config = MemAttnConfig(attention=attention, parts=list(parts), **SIZES | sizes)
    return perturb(MemAttnForCausalLM(config).to(dtype).eval())


def test_it_is_exact():
    report = audit(make_composed(num_hidden_layers=1), seq_len=12)
    assert report.verdict == "all 0", [row for row in report.rows if row.value]


@torch.no_grad()
def test_beams_go_on_from_one_cache_that_was_saved(tmp_path):
    model, tokens = make_composed(), make_tokens(T=11)
    options = dict(max_new_tokens=6, do_sample=False, num_beams=3, eos_token_id=None)
    expected = model.generate(tokens, **options)
    cache = MemAttnCache(model.config)
    model(tokens[:, :9], past_key_values=cache)
    cache.save(tmp_path / "state.safetensors")
    cache = MemAttnCache.load(tmp_path / "state.safetensors")
    assert list(cache.layers[0].parts) == ["attention", "chapter_memory", "specialists"]
    cache.batch_repeat_interleave(3)
    assert torch.equal(model.generate(tokens, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("removed", ["memory", "chapter_memory", "specialists"])
def test_each_part_changes_the_logits(removed):
    model, tokens = make_composed(), make_tokens()
    attention, state = MAC, model.state_dict()
    if removed == "memory":  # the same attention, in the same segments
        attention = dict(kind="segmented", segment_len=4, num_persistent_tokens=1)
        state = {name.replace("attention.attention.", "attention."): x for name, x in state.items()}
    rest = make_composed(attention, [part for part in PARTS if part["kind"] != removed])
    assert not rest.load_state_dict(state, strict=False).missing_keys
    assert not torch.allclose(logits_of(rest, tokens), logits_of(model, tokens))


def test_all_learn_together_and_each_alone():
    whose = {
        "memory": ".attention.memory.",
        "chapter_memory": "chapter_memory",
        "specialists": ".specialists.",
    }
    tokens = make_tokens()
    for parts in (whose, *([name] for name in whose)):
        model = make_composed(dtype=torch.float32).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(whose[part] in name for part in parts))
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-2)
        found = []
        for _ in range(6):
            output = model(tokens, labels=tokens)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append((output.lm_loss, output.load_balance_loss, output.gate_entropy))
        fell = [after < before for before, after in zip(found[0], found[-1], strict=True)]
        assert fell[0], (parts, found)
        assert all(fell) or len(parts) == 1, found  # those of the parts, too
