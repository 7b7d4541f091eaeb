"""Conversations: rows of messages, loaded from anywhere and tokenized with their answers marked."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memattn.checks import check_int, must
from memattn.data.chat import ChatTokens, Message, chat_template, encode_chat
from memattn.data.collections import COLLECTIONS
from memattn.data.corpora import CORPORA
from memattn.data.hub import load_hub_rows
from memattn.data.json_lines import read_json_lines, read_utf8
from memattn.data.tokens import Tokens, read_tokens, tokenizer_identity, write_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation(NamedTuple):
    """Messages with their identity."""

    title: str  # "" where it has no name of its own
    messages: list[Message]

    @property
    def text(self) -> str:
        """All messages as one text, to find duplicates."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def load_conversations(
    source: str | Path | Sequence[str | Path],
    *,
    subset: str | None = None,
    split: str | None = None,
    messages_field: str = "messages",
) -> list[Conversation]:
    """Load the conversations of local files or of a Hugging Face dataset.

    Args:
        source: One of, or a list of: a ``.jsonl`` file, a folder that is searched for them, or a
            Hugging Face dataset ``owner/name``, which needs ``pip install datasets``. Each row has
            a list of ``{"role": ..., "content": ...}``, as in HuggingFaceH4/ultrachat_200k.
        subset: Configuration of a Hugging Face dataset.
        split: Split of a Hugging Face dataset; None means ``"train"``. Where there is none of the
            name, that of the name and ``_sft`` is read, with a warning.
        messages_field: Field with the messages.

    Returns:
        The conversations that have an answer, in the source's order.

    Raises:
        ValueError: If the source is none of these, or a row has no messages.
        FileNotFoundError, ImportError, ConnectionError: As ``load_documents`` does.
    """
    if isinstance(source, str | Path):
        source = [source]
    conversations = []
    for one in source:
        for place, row in _read_rows(one, subset, split or "train", messages_field):
            conversations.append(_conversation(place, row, messages_field))
    conversations = [c for c in conversations if any(m["role"] == "assistant" for m in c.messages)]
    if not conversations:
        must("source", "hold conversations with answers", ", ".join(map(str, source)) or "nothing")
    return conversations


def tokenize_conversations(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    max_len: int,
    *,
    cache_dir: str | Path | None = None,
) -> tuple[Tokens, str]:
    """Tokenize conversations by the tokenizer's chat template; answers are marked for learning.

    A conversation longer than ``max_len`` ends after the last answer that fits as a whole. Where
    not even the first one does, its beginning is kept; where no token of it fits, the conversation
    is left out.

    Args:
        conversations: Conversations.
        tokenizer: A fast transformers tokenizer with a chat template.
        max_len: Tokens in a row.
        cache_dir: Folder that keeps the result; None keeps nothing.

    Returns:
        The tokens, of which ``trained`` marks the answers, and what was cut, in words: ``""`` where
        nothing was.

    Raises:
        ValueError: If there is no chat template, it does not fit, or no answer is left.
        OSError: If the result cannot be kept.
    """
    check_int("max_len", max_len, 2)
    file = None
    if cache_dir is not None:
        key = _fingerprint(conversations, tokenizer, max_len)
        file = Path(cache_dir).expanduser() / "tokens" / key / "tokens.safetensors"
        if (kept := read_tokens(file)) is not None:
            return kept
    rows, lost, left_out, total = [], 0, 0, 0
    for conversation in conversations:
        chat = encode_chat(tokenizer, conversation.messages)
        row = _cut(chat, max_len)
        total += len(chat.answers)
        lost += sum(end > (0 if row is None else len(row.ids)) for _, end in chat.answers)
        left_out += row is None
        if row is not None:
            rows.append(row)
    if not rows:
        must("seq_len", "leave room for an answer after its question", max_len)
    lengths = torch.tensor([0, *(len(row.ids) for row in rows)], dtype=torch.int64)
    tokens = Tokens(
        torch.tensor([i for row in rows for i in row.ids], dtype=torch.int32),
        lengths.cumsum(0),
        sum(len(c.text.encode("utf-8", "replace")) for c in conversations),
        torch.tensor([t for row in rows for t in row.trained]),
    )
    note = ""
    if lost:
        note = f"{lost:,} of {total:,} answers do not fit whole into rows of {max_len} tokens"
        note += f", and {left_out:,} of {len(conversations):,} conversations are left out"
    if file is not None:
        write_tokens(file, tokens, note)
    return tokens, note


def _cut(chat: ChatTokens, max_len: int) -> ChatTokens | None:
    """The conversation as far as it fits; None where nothing of an answer does."""
    if len(chat.ids) <= max_len:
        return chat if chat.answers else None
    whole = [end for _, end in chat.answers if end <= max_len]
    stop = whole[-1] if whole else max_len
    if not any(chat.trained[1:stop]):
        return None
    return ChatTokens(chat.ids[:stop], chat.trained[:stop], chat.answers)


def _read_rows(
    source: str | Path, subset: str | None, split: str, messages_field: str
) -> Iterator[tuple[str, Any]]:
    """Rows of one source, each with its place."""
    path = Path(source).expanduser()
    if source in CORPORA or source in COLLECTIONS:
        must("source", "hold conversations, not documents", source)
    if path.exists():
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not files or any(file.suffix != ".jsonl" for file in files):
            must("source", "be a .jsonl file or a folder with some", path)
        for file in files:
            yield from read_json_lines(file, read_utf8(file))
        return
    if isinstance(source, Path) or source.endswith(".jsonl") or source[:1] in "./~":
        raise FileNotFoundError(f"source must be a file or folder that exists, got {source}")
    if source.count("/") != 1:
        must("source", "be a file, a folder or a Hugging Face dataset `owner/name`", repr(source))
    rows = load_hub_rows(source, subset, split)
    if messages_field not in rows.column_names:
        must("messages_field", f"be one of {', '.join(rows.column_names)}", messages_field)
    yield from ((f"{source}[{i}]", row) for i, row in enumerate(rows))


def _conversation(place: str, row: Any, messages_field: str) -> Conversation:
    """The conversation of a row."""
    messages = row.get(messages_field) if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        what = "a list of messages, each with role and content"
        must(
            place,
            f'be an object with {what}, in "{messages_field}"',
            json.dumps(row, default=str)[:80],
        )
    return Conversation(str(row.get("title") or ""), messages)


def _fingerprint(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", max_len: int
) -> str:
    """Hash of everything that the tokens depend on."""
    digest = hashlib.sha256(f"chat {max_len}\n{chat_template(tokenizer)}\n".encode())
    for part in (*tokenizer_identity(tokenizer), *(json.dumps(c.messages) for c in conversations)):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(raw)}\n".encode() + raw)
    return digest.hexdigest()[:32]
