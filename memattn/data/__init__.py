"""Corpora, tokenizers and batches."""

from memattn.data.batches import Batches, PackedBatches, PaddedBatches
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
from memattn.data.tokenizer import Tokens, load_tokenizer, tokenize_documents, train_tokenizer

__all__ = [
    "CORPORA",
    "LABELLED",
    "Batches",
    "Corpus",
    "Document",
    "LabelledSplit",
    "LabelledText",
    "LabelledTexts",
    "PackedBatches",
    "PaddedBatches",
    "Split",
    "Tokens",
    "fetch_corpus",
    "get_corpus",
    "get_labelled",
    "is_cached",
    "load_documents",
    "load_labelled",
    "load_tokenizer",
    "split_documents",
    "split_labelled",
    "tokenize_documents",
    "train_tokenizer",
]
