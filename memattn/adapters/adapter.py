"""The handle of one attached adapter, by which a user saves and detaches it."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memattn.adapters.attach import Parts, attach_parts, attached, base_of, detach_parts
from memattn.adapters.attachment import Adapter
from memattn.adapters.files import CHAPTERS, CONFIG, INSIDE, read_adapter, save_adapter
from memattn.checks import must
from memattn.parts import PartConfig
from memattn.parts.chapters import Chapters


class MemoryAdapter:
    """One adapter that is attached to a model; ``attach_memory`` makes it.

    Attributes:
        model: The transformers model.
        name: The adapter's name.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, attachment = attached(model)
        attachment.check_name(name)
        self.name = name

    @property
    def _adapter(self) -> Adapter:
        _, attachment = attached(self.model)
        attachment.check_name(self.name)
        return attachment.adapters[self.name]

    @property
    def parts(self) -> list[PartConfig]:
        """Its parts."""
        return list(self._adapter.parts.values())

    @property
    def chapters(self) -> Chapters:
        """The chapters of texts that its parts keep, open or closed."""
        return self._adapter.chapters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters by the names that they have in the model."""
        own = set(self._adapter.parameters())
        return ((name, p) for name, p in self.model.named_parameters() if p in own)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def num_parameters(self) -> int:
        """Number of its parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write its parts, weights and chapters, without the model.

        Args:
            folder: A new or empty folder, or one with a saved adapter, which is replaced at the
                end: if writing fails, it stays whole.
            state_dict: Weights of the whole model where its own are sharded, as
                ``accelerator.get_state_dict(model)`` returns them.
            is_main_process: Whether this process writes.

        Raises:
            ValueError: If the folder holds something else, or ``state_dict`` lacks a weight.
        """
        save_adapter(
            folder,
            self.model,
            self._adapter,
            state_dict=state_dict,
            is_main_process=is_main_process,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        name: str = "default",
        freeze_base: bool = True,
        dtype: torch.dtype | None = None,
    ) -> "MemoryAdapter":
        """Attach an adapter that ``save_pretrained`` wrote.

        Args:
            model: A model of the architecture and the sizes that it was saved from.
            folder: Where it is, or the folder of a whole model that was saved with it.
            name: The name that it gets here.
            freeze_base: As in ``attach_memory``.
            dtype: Of its weights; None means that of the file.

        Returns:
            The handle. The adapter is active; those attached before are not.

        Raises:
            FileNotFoundError: If the folder holds no adapter.
            ValueError: If a file is damaged, or of a model with another architecture or other
                sizes; the model is then unchanged.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file() and (folder / INSIDE / name).is_dir():
            folder = folder / INSIDE / name
        saved = read_adapter(folder, base_of(model))
        attach_parts(
            model,
            saved.parts,
            name=name,
            freeze_base=freeze_base,
            dtype=dtype or saved.dtype,
            weights=saved.weights,
        )
        adapter = cls(model, name)
        try:
            if (folder / CHAPTERS).is_file():
                adapter.chapters.load(folder / CHAPTERS)
        except ValueError:
            adapter.detach()
            raise
        return adapter

    def detach(self) -> None:
        """Detach it from the model."""
        detach_parts(self.model, self.name)

    def __repr__(self) -> str:
        parts = ", ".join(part.kind for part in self.parts)
        return f"MemoryAdapter({self.name!r}: {parts} in {type(self.model).__name__})"


def attach_memory(
    model: nn.Module,
    config: Parts,
    *,
    name: str = "default",
    freeze_base: bool = True,
    dtype: torch.dtype | None = None,
) -> MemoryAdapter:
    """Put parts, such as a chapter memory, into the layers of a pretrained model, in place.

    A part's ``resolved_place`` decides where it runs: between attention and the MLP (after the norm
    of attention's output, if there is one), after the MLP, or before attention, each with its own
    norm and a residual connection. The modules of the model stay the same objects with the same
    names, its ``forward`` stays as it is. A part whose output starts at zero leaves the logits as
    they are, bit for bit.

    Then ``model(...)`` returns ``losses`` and ``loss_counts`` of parts beside its own fields, in
    training mode and with ``output_losses=True``; in training mode they are in ``loss``, each times
    its coefficient, if labels are given. ``use_cache`` is False in training mode by default. The
    state of parts lives in the cache that ``generate`` or the caller passes.

    Args:
        model: A causal language model of transformers, or one inside PEFT's.
        config: A part, its kind and fields as a dict, or a list of such.
        name: Name of this adapter. A model may have several; the newest is active.
        freeze_base: Whether the first attachment freezes the parameters of the model. PEFT's
            parameters keep their ``requires_grad``.
        dtype: Of the new parameters; None means that of each layer.

    Returns:
        The adapter, by which it is saved and detached.

    Raises:
        TypeError: If ``model`` is no transformers model, or ``config`` is no part.
        ValueError: If the layers are not found, a layer has no such place (where attention and MLP
            run side by side there is none between them), a part does not fit, the name is taken,
            or the model is sharded or dispatched over devices already.
    """
    attach_parts(model, config, name=name, freeze_base=freeze_base, dtype=dtype)
    return MemoryAdapter(model, name)


def detach_memory(model: nn.Module, name: str | None = None) -> None:
    """Detach an adapter from a model, or all of them. After the last one the model has its own
    modules and classes again, and parameters that attaching froze are trainable again.

    Args:
        model: A model with attached parts.
        name: Name of the adapter; None means all.

    Raises:
        ValueError: If there is no such adapter, or the model was sharded after attaching.
    """
    detach_parts(model, name)


def adapters_of(model: nn.Module) -> dict[str, MemoryAdapter]:
    """The adapters of a model by name, the active ones first."""
    _, attachment = attached(model)
    names = dict.fromkeys((*attachment.active, *attachment.adapters))
    return {name: MemoryAdapter(model, name) for name in names}


def set_adapter(model: nn.Module, *names: str) -> None:
    """Choose the active adapters: they run one after the other in each place, and are trainable.

    Args:
        model: A model with attached parts.
        names: At least one name.

    Raises:
        ValueError: If there is no such adapter, or two give a loss different coefficients.
    """
    _, attachment = attached(model)
    if not names:
        must("names", "have at least one name (see disable_adapters)", "none")
    attachment.activate(names)


def disable_adapters(model: nn.Module) -> None:
    """Run the model without its adapters until ``enable_adapters``."""
    attached(model)[1].is_enabled = False


def enable_adapters(model: nn.Module) -> None:
    """Run the model with its active adapters again."""
    attached(model)[1].is_enabled = True
