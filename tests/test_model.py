"""The decoder: exactness by perturbation, packing, padding, gradients, saving."""

import doctest
import importlib

import pytest
import torch
from model_factories import (
    SYSTEMS,
    VOCAB,
    enable_checkpointing,
    logits_of,
    make_config,
    make_model,
    make_tokens,
    pad_left,
)
from transformers import AutoModel, AutoModelForCausalLM

from memattn.models import (
    AttentionConfig,
    MemAttnForCausalLM,
    MemAttnModel,
)
from memattn.nn import RotaryEmbedding, sequence_positions

EXACT = dict(rtol=0, atol=1e-12)


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


def test_shapes(system):
    model = make_model(system)
    output = model(make_tokens(T=11), labels=make_tokens(T=11), output_hidden_states=True)
    assert output.logits.shape == (2, 11, VOCAB)
    assert output.loss.shape == ()
    assert len(output.hidden_states) == 3
    assert all(states.shape == (2, 11, 32) for states in output.hidden_states)
    assert output.past_key_values.position == 11
    assert model(make_tokens(T=11), use_cache=False).past_key_values is None
    assert isinstance(model(make_tokens(), return_dict=False), tuple)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_later_tokens_do_not_change_earlier_logits(system, dtype):
    model, tokens = make_model(system, dtype), make_tokens()
    before = logits_of(model, tokens)
    for t in (1, 7, 22):
        changed = tokens.clone()
        changed[:, t:] = make_tokens(seed=1)[:, t:]
        after = logits_of(model, changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_do_not_change_each_other(system, dtype):
    model, tokens = make_model(system, dtype), make_tokens()
    changed = torch.cat([tokens[:1], make_tokens(seed=1)[1:]])
    assert torch.equal(logits_of(model, tokens)[0], logits_of(model, changed)[0])


def test_segments_and_windows_end_what_a_token_sees():
    tokens = make_tokens()
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % VOCAB
    model = make_model("segments", num_hidden_layers=1)
    same = (logits_of(model, tokens) == logits_of(model, changed)).all(-1).all(0)
    assert same.tolist() == [False] * 5 + [True] * 18
    model = make_model("window", num_hidden_layers=1)
    same = (logits_of(model, tokens) == logits_of(model, changed)).all(-1).all(0)
    assert same.tolist() == [False] * 4 + [True] * 19


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(system, side):
    model, tokens = make_model(system), make_tokens(T=13)
    left, right = dict(left=(6, 0), right=(0, 6), both=(2, 4))[side]
    padded = torch.nn.functional.pad(tokens, (left, right))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
    rows = slice(left, left + 13)
    expected = logits_of(model, tokens)
    actual = logits_of(model, padded, attention_mask=mask)[:, rows]
    torch.testing.assert_close(actual, expected, **EXACT)
    # what stands in the padding is never read
    padded = torch.where(mask == 1, padded, make_tokens(T=19, seed=5))
    assert torch.equal(logits_of(model, padded, attention_mask=mask)[:, rows], actual)
    assert torch.equal(logits_of(model, padded, attention_mask=mask.bool())[:, rows], actual)


def test_packed_documents_equal_separate_ones(system):
    model, lengths = make_model(system), [1, 13, 8, 5]
    tokens = make_tokens(B=1, T=sum(lengths))
    cu_seqlens = torch.tensor([0, 1, 14, 22, 27], dtype=torch.int32)
    packed = model(tokens, cu_seqlens=cu_seqlens)
    assert packed.past_key_values is None
    for part, expected in zip(
        tokens.split(lengths, 1), packed.logits.split(lengths, 1), strict=True
    ):
        torch.testing.assert_close(logits_of(model, part), expected, **EXACT)


def test_position_ids_may_say_what_the_model_counts(system):
    model = make_model(system)
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :5]], 9)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    expected = logits_of(model, tokens, attention_mask=mask)
    actual = logits_of(model, tokens, attention_mask=mask, position_ids=positions)
    assert torch.equal(actual, expected)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model(tokens[:1], cu_seqlens=cu_seqlens, position_ids=positions)
    with pytest.raises(ValueError, match="position_ids must count from the start of each sequence"):
        model(tokens[:1], cu_seqlens=cu_seqlens, position_ids=positions + 1)


def test_long_segments_are_vanilla_attention():
    vanilla, tokens = make_model("vanilla"), make_tokens()
    for options in (dict(segment_len=23), dict(window_size=23)):
        config = make_config("vanilla")
        config.attention = AttentionConfig(kind="segmented", **options)
        model = MemAttnForCausalLM(config).double().eval()
        model.load_state_dict(vanilla.state_dict())  # weights for weights
        assert torch.equal(logits_of(model, tokens), logits_of(vanilla, tokens))


def test_every_parameter_receives_a_gradient(system):
    torch.manual_seed(0)
    model = MemAttnForCausalLM(make_config(system))  # as initialised, in float32
    for parameter in model.parameters():
        if not parameter.any():  # an output that starts at zero hides what stands before it
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = make_tokens()
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert abs(model(tokens, labels=tokens).loss.item() - torch.tensor(float(VOCAB)).log()) < 0.2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(use_reentrant):
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :9]], 23)
    grads = []
    for checkpointing in (False, True):
        model = make_model("both").train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(ValueError, match="use_cache must not be True with gradient checkpointing"):
        model(tokens, use_cache=True)


def test_loss_is_the_shifted_cross_entropy():
    model, tokens = make_model(), make_tokens()
    labels = tokens.clone()
    labels[:, 4] = -100
    logits = logits_of(model, tokens)[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, labels=labels).loss, losses / 42)
        accumulated = model(tokens, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(accumulated, losses / 100)


def test_logits_to_keep():
    model, tokens = make_model(), make_tokens()
    logits = logits_of(model, tokens)
    torch.testing.assert_close(logits_of(model, tokens, logits_to_keep=3), logits[:, -3:], **EXACT)
    kept = torch.tensor([0, 5])
    torch.testing.assert_close(
        logits_of(model, tokens, logits_to_keep=kept), logits[:, kept], **EXACT
    )


def test_inputs_embeds_equal_tokens():
    model, tokens = make_model(), make_tokens()
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, system, tied):
    model, tokens = make_model(system, torch.float32, tie_word_embeddings=tied), make_tokens()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MemAttnForCausalLM
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert loaded.config.attention == model.config.attention
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    # bit for bit once weights lie in memory alike: matrix products depend on alignment
    again = make_model(system, torch.float32, tie_word_embeddings=tied)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is MemAttnModel
    torch.testing.assert_close(
        body(tokens).last_hidden_state, model.model(tokens).last_hidden_state
    )


def test_attention_may_be_replaced_when_loading(tmp_path):
    model, tokens = make_model("vanilla"), make_tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attention=dict(kind="segmented", segment_len=5), dtype=torch.float64
    )
    assert loaded.config.attention == AttentionConfig(kind="segmented", segment_len=5)
    torch.testing.assert_close(logits_of(loaded, tokens)[:, :5], logits_of(model, tokens)[:, :5])
    assert not torch.allclose(logits_of(loaded, tokens), logits_of(model, tokens), atol=1e-3)


# peft asks transformers by an old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_trains_and_generates():
    peft = pytest.importorskip("peft")
    tokens = make_tokens()
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), adapter)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora" in name for name in trained)
    assert model.eval().generate(input_ids=tokens, max_new_tokens=3).shape[1] > 23


def test_blocks_are_what_sharding_wraps():
    model = make_model()
    assert {type(layer).__name__ for layer in model.model.layers} == set(model._no_split_modules)


@pytest.mark.parametrize(
    "module", ["nn.segmented_attention", "models.decoder", "models.cache"], ids=str
)
def test_docstring_examples_run(module):
    model = make_model()
    names = dict(
        torch=torch,
        RotaryEmbedding=RotaryEmbedding,
        sequence_positions=sequence_positions,
        model=model,
        input_ids=make_tokens(T=150),
    )
    module = importlib.import_module(f"memattn.{module}")
    results = doctest.testmod(module, extraglobs=names)
    assert results.failed == 0 and results.attempted > 0


def test_resize_token_embeddings():
    model = make_model()
    model.resize_token_embeddings(64, mean_resizing=False)
    assert model.config.vocab_size == 64
    assert model(torch.full((1, 3), 63)).logits.shape == (1, 3, 64)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bfloat16_and_autocast():
    tokens = make_tokens()
    expected = logits_of(make_model(), tokens)
    model = make_model(dtype=torch.bfloat16)
    assert logits_of(model, tokens).dtype == torch.bfloat16
    error = (logits_of(model, tokens).double() - expected).abs().max() / expected.abs().max()
    assert error < 0.05
    model = make_model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.model.layers[0].attention.persistent_key.grad.any()


@pytest.mark.usefixtures("new_programs")
def test_compiles_as_one_graph():
    model = make_model(dtype=torch.float32).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :9]], 23)
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
    actual = compiled(tokens, attention_mask=mask).logits[mask == 1]
    torch.testing.assert_close(actual, model(tokens, attention_mask=mask).logits[mask == 1])
