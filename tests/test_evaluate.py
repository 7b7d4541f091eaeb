"""perplexity: against loss computed token by token, by hand."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memattn.evaluate import Perplexity, perplexity

TEXTS = ["a b c d e f g h i j k", "c a", "é b b b b a", ""]


def make_model(**sizes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(
            vocab_size=14,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        | sizes
    )
    return LlamaForCausalLM(config)


def make_tokenizer(**special):
    words = ["<unk>", "<s>", *"abcdefghijk"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@torch.no_grad()
def loss_by_hand(model, documents, context_len, stride):
    """Sum of the loss and number of tokens, one forward pass for each token."""
    model.eval()
    total, count = 0.0, 0
    for tokens in documents:
        for i in range(1, len(tokens)):
            if i <= context_len:
                end = min(len(tokens), context_len + 1)
            else:
                end = context_len + 1 + stride * -(-(i - context_len) // stride)
                end = min(end, len(tokens))
            start = max(0, end - 1 - context_len)
            logits = model(torch.tensor([tokens[start:i]])).logits[0, -1].double()
            total -= logits.log_softmax(-1)[tokens[i]].item()
            count += 1
    return total, count


@pytest.mark.parametrize(("context_len", "stride"), [(32, 32), (4, 4), (4, 1), (5, 3), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_documents_match_the_loss_of_each_token(context_len, stride, batch_size):
    model, tokenizer = make_model(), make_tokenizer(bos_token="<s>")
    result = perplexity(
        model, TEXTS, tokenizer, context_len=context_len, stride=stride, batch_size=batch_size
    )
    documents = [[1, *tokenizer(text)["input_ids"]] for text in TEXTS]
    total, count = loss_by_hand(model, documents, context_len, stride)
    assert result.num_tokens == count == 19
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    # "é" is two bytes; the words are those of the text, whatever the tokenizer does
    assert result.num_bytes == sum(len(t) for t in TEXTS) + 1 and result.num_words == 19
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / result.num_bytes, rel=1e-5)
    assert result.word_perplexity == pytest.approx(math.exp(total / 19), rel=1e-5)


def test_more_context_changes_the_loss():
    model, tokenizer = make_model(), make_tokenizer(bos_token="<s>")
    losses = {
        stride: perplexity(model, TEXTS[:1], tokenizer, context_len=4, stride=stride).loss
        for stride in (4, 1)
    }
    assert losses[4] != losses[1]


def test_batches_weigh_every_token_the_same():
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    batches, total, count = [], 0.0, 0
    for rows, length, masked in [(2, 7, 5), (1, 3, 0), (3, 9, 8)]:
        ids = torch.randint(14, (rows, length), generator=generator)
        labels = ids.clone()
        labels[:, :masked] = -100
        batches.append({"input_ids": ids, "labels": labels})
        logits = model.eval()(ids).logits[:, :-1].double().log_softmax(-1)
        for b in range(rows):
            for t in range(max(1, masked), length):
                total -= logits[b, t - 1, ids[b, t]].item()
                count += 1
    result = perplexity(model.train(), batches)
    assert model.training
    assert result.num_tokens == count and result.loss == pytest.approx(total / count, rel=1e-5)
    # the mean of the batches' means is another number
    means = [model(**batch).loss.item() for batch in batches]
    assert result.loss != pytest.approx(sum(means) / 3, rel=1e-3)
    assert result.num_bytes is result.bits_per_byte is result.word_perplexity is None


def test_packed_rows_do_not_predict_across_documents():
    from memattn.models import MemAttnConfig, MemAttnForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = MemAttnForCausalLM(MemAttnConfig.segmented(segment_len=3, window_size=2, **sizes))
    ids = torch.randint(14, (1, 11))
    labels = ids.clone()
    labels[0, [0, 4]] = -100
    cu_seqlens = torch.tensor([0, 4, 11], dtype=torch.int32)
    packed = perplexity(model, [{"input_ids": ids, "labels": labels, "cu_seqlens": cu_seqlens}])
    parts = [ids[:, :4], ids[:, 4:]]
    apart = perplexity(model, [{"input_ids": part, "labels": part} for part in parts])
    assert packed.num_tokens == apart.num_tokens == 9
    assert packed.loss == pytest.approx(apart.loss, rel=1e-5)


def test_end_of_text_stands_in_for_a_missing_begin_of_text():
    model = make_model()
    one = perplexity(model, TEXTS, make_tokenizer(bos_token="<s>"))
    other = perplexity(model, TEXTS, make_tokenizer(eos_token="<s>"))
    assert one == other


def test_infinite_perplexity_is_a_number():
    assert Perplexity(loss=1000.0, num_tokens=1).perplexity == math.inf
    values = Perplexity(loss=1.0, num_tokens=2, num_bytes=4, num_words=1).to_dict()
    assert values["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    assert values["word_perplexity"] == pytest.approx(math.exp(2))


def test_errors_name_the_argument():
    model, tokenizer = make_model(), make_tokenizer(bos_token="<s>")
    with pytest.raises(TypeError, match="data must be a list of texts or batches, got str"):
        perplexity(model, "a b", tokenizer)
    with pytest.raises(ValueError, match="context_len must be None without a tokenizer, got 4"):
        perplexity(model, [], context_len=4)
    with pytest.raises(ValueError, match="context_len must be at least 1, got 0"):
        perplexity(model, TEXTS, tokenizer, context_len=0)
    with pytest.raises(ValueError, match="stride must be between 1 and context_len=4, got 5"):
        perplexity(model, TEXTS, tokenizer, context_len=4, stride=5)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        perplexity(model, TEXTS, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="data must have at least one token to predict"):
        perplexity(model, [], tokenizer)
    with pytest.raises(ValueError, match="data must be batches with labels, got input_ids"):
        perplexity(model, [{"input_ids": torch.zeros(1, 3, dtype=torch.long)}])
    with pytest.raises(ValueError, match="tokenizer must have a bos_token or an eos_token"):
        perplexity(model, TEXTS, make_tokenizer())
