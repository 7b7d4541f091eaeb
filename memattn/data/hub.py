"""Rows of Hugging Face datasets."""

import warnings
from typing import Any

from memattn.checks import must


def load_hub_rows(name: str, subset: str | None, split: str) -> Any:
    """Rows of a Hugging Face dataset, an iterable of dicts with ``column_names``.

    A dataset without the split, but with one of that name and ``_sft``, such as
    HuggingFaceH4/ultrachat_200k, returns that one with a warning.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ConnectionError: If there is no such dataset, or no hub and no copy of it.
        ValueError: If it has no such split.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            f"Hugging Face dataset {name} must be loaded by datasets, which is not installed: "
            "pip install 'memattn[hub]' (if a local path was meant: there is no such file; "
            "dataset_name takes a local file or folder too)"
        ) from None
    try:
        try:
            return datasets.load_dataset(name, subset, split=split)
        except ValueError:  # an unknown split
            known = list(datasets.get_dataset_split_names(name, subset))
            if split in known:
                raise
            if f"{split}_sft" not in known:
                must("split", f"be one of {', '.join(known)} for {name}", split)
            warnings.warn(f"{name} has no split {split}: {split}_sft is read", stacklevel=4)
            return datasets.load_dataset(name, subset, split=f"{split}_sft")
    except (ConnectionError, FileNotFoundError) as error:  # the latter: unknown, or offline
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"Hugging Face dataset {name} must be on a hub that can be reached, or dataset_name "
            f"name a local file or folder, got: {reason}"
        ) from error
