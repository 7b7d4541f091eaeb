"""Corpora, tokenizers and batches."""

from memattn.data.batches import Batches, PackedBatches, PaddedBatches, WholeBatches
from memattn.data.chat import ChatTokens, encode_chat
from memattn.data.collections import COLLECTIONS, Collection
from memattn.data.conversations import (
    Conversation,
    load_conversations,
    tokenize_conversations,
)
from memattn.data.corpora import CORPORA, Corpus, fetch_corpus, get_corpus, is_cached
from memattn.data.documents import Document, Split, load_documents, split_documents
from memattn.data.labelled import (
    LABELLED,
    LabelledSplit,
    LabelledText,
    LabelledTexts,
    get_labelled,
    load_labelled,
    split_labelled,
)
from memattn.data.tokenizer import load_tokenizer, tokenize_documents, train_tokenizer
from memattn.data.tokens import Tokens

__all__ = [
    "COLLECTIONS",
    "CORPORA",
    "LABELLED",
    "Batches",
    "ChatTokens",
    "Collection",
    "Conversation",
    "Corpus",
    "Document",
    "LabelledSplit",
    "LabelledText",
    "LabelledTexts",
    "PackedBatches",
    "PaddedBatches",
    "Split",
    "Tokens",
    "WholeBatches",
    "encode_chat",
    "fetch_corpus",
    "get_corpus",
    "get_labelled",
    "is_cached",
    "load_conversations",
    "load_documents",
    "load_labelled",
    "load_tokenizer",
    "split_documents",
    "split_labelled",
    "tokenize_conversations",
    "tokenize_documents",
    "train_tokenizer",
]
