"""A tokenized corpus, and the file that keeps it."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from memattn.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """A tokenized corpus: the ids of all documents in one row, and their bounds."""

    ids: Tensor  # int32 [N]
    bounds: Tensor  # int64 [n_documents + 1], 0 ... N
    num_bytes: int  # UTF-8 bytes of the texts, for bits per byte
    trained: Tensor | None = None  # bool [N], the tokens to learn; None means all
    domains: Tensor | None = None  # int64 [n_documents], domain of each; None: unknown
    domain_weights: Tensor | None = None  # float32 [n_domains], weight of a token of each

    @property
    def num_documents(self) -> int:
        return len(self.bounds) - 1


def write_tokens(file: Path, tokens: Tokens, note: str = "") -> None:
    """Write tokens to a file in a folder of its own; it appears once it is whole.

    Raises:
        OSError: If they cannot be kept.
    """
    from safetensors.torch import save_file

    tensors = {"ids": tokens.ids, "bounds": tokens.bounds}
    if tokens.trained is not None:
        tensors["trained"] = tokens.trained
    with replacing(file.parent) as folder:
        facts = {"num_bytes": str(tokens.num_bytes), "note": note}
        save_file(tensors, folder / file.name, facts)


def read_tokens(file: Path) -> tuple[Tokens, str] | None:
    """Tokens and note of a file that ``write_tokens`` wrote; None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as kept:
            facts = kept.metadata()
            trained = kept.get_tensor("trained") if "trained" in kept.keys() else None  # noqa: SIM118
            ids, bounds = kept.get_tensor("ids"), kept.get_tensor("bounds")
            return Tokens(ids, bounds, int(facts["num_bytes"]), trained), facts.get("note", "")
    except SafetensorError:
        return None


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """All settings of a tokenizer that decide its tokens, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = (
        str(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    )
    special = f"{type(tokenizer).__name__} {tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    return description, special
