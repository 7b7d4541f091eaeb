"""Chat templates: a conversation as tokens, and which of them are answers.

A template that marks answers with ``{% generation %}`` gives a mask of them itself. With any other
template the conversation is rendered several times to find the answers. An answer begins where the
conversation before it ends, rendered with the generation prompt: a model that writes the answer is
given exactly this. An answer ends where the text after it begins, so the tokens that close the turn
belong to it. This place is found by rendering the conversation once more with another text as
answer, since templates may cut, strip or reorder texts.
"""

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from memattn.checks import must

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_STAND_IN = "memattn-stands-here-for-an-answer"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTokens(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    trained: list[bool]  # True on the tokens of answers and those that close them
    answers: list[tuple[int, int]]  # first token of each answer, and the one after its last


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> ChatTokens:
    """Render a conversation with the tokenizer's chat template, and find the answers in it.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: ``{"role": ..., "content": ...}``; those of role ``assistant`` are answers.

    Returns:
        The tokens of the whole conversation, and which of them a model is to learn.

    Raises:
        ValueError: If there is no chat template, the template refuses the conversation, or it
            renders an answer in a way that cannot be found again.
        NotImplementedError: If the tokenizer gives no offsets of its tokens in the text.
    """
    template = chat_template(tokenizer)
    if not tokenizer.is_fast:
        must(
            "tokenizer",
            "be a fast one, which knows where its tokens stand",
            type(tokenizer).__name__,
            NotImplementedError,
        )
    if _GENERATION.search(template):
        encoded: Any = _render(
            tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return _with_answers(encoded["input_ids"], list(map(bool, encoded["assistant_masks"])))
    text, closing = _render(tokenizer, messages), _closing(tokenizer)
    spans = [
        _answer_span(tokenizer, messages, i, text, closing)
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    # the template has put the special tokens into the text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    trained = [
        # a token that begins in the prompt is not part of the answer
        any(first <= begin < last for first, last in spans)
        for begin, _ in offsets
    ]
    return _with_answers(ids, trained)


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template of a tokenizer.

    Raises:
        ValueError: If it has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        must(
            "data.chat_template",
            "name a file with a chat template for a tokenizer without one",
            tokenizer.name_or_path or type(tokenizer).__name__,
        )
    return str(template)


def _render(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
    """``apply_chat_template``, with one error for whatever a template raises."""
    from jinja2 import TemplateError

    options = {"tokenize": False, **options}
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (TemplateError, IndexError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        must("messages", f"fit the chat template ({error})", f"roles {roles}")


def _answer_span(
    tokenizer: Any, messages: Sequence[Message], index: int, text: str, closing: str
) -> tuple[int, int]:
    """Where in the text an answer begins, and where it and what closes it end."""
    other = {**messages[index], "content": _STAND_IN}
    changed = _render(tokenizer, [*messages[:index], other, *messages[index + 1 :]])
    before, found, after = changed.partition(_STAND_IN)
    begin = None
    if index > 0:
        prompt = _render(tokenizer, messages[:index], add_generation_prompt=True)
        begin = len(prompt) if text.startswith(prompt) else None
    if begin is None and text.startswith(before):
        begin = len(before)
    end = len(text) - len(after)
    if not found or begin is None or not text.endswith(after) or end < begin:
        got = repr(str(messages[index]["content"])[:40])
        must(f"messages[{index}]", "be rendered by the chat template as it stands", got)
    end += len(commonprefix([closing, after]))
    return begin, end


def _closing(tokenizer: Any) -> str:
    """What the template writes to close an answer, up to the end-of-text token where it has one."""
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": _STAND_IN}]
    closing = _render(tokenizer, messages).partition(_STAND_IN)[2]
    end = tokenizer.eos_token
    # nothing is written after the end of text
    return closing[: closing.index(end) + len(end)] if end and end in closing else closing


def _with_answers(ids: list[int], trained: list[bool]) -> ChatTokens:
    """The tokens with the bounds of each run of trained ones."""
    padded = [False, *trained, False]
    edges = [i for i in range(len(trained) + 1) if padded[i] != padded[i + 1]]
    return ChatTokens(ids, trained, list(zip(edges[::2], edges[1::2], strict=True)))
