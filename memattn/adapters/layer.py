"""What an attached decoder layer and its child at the end of attention do beside their own work."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from memattn.adapters.attachment import Attachment
from memattn.adapters.call import Call, LayerRun
from memattn.adapters.swap import Swapped
from memattn.checks import must


class AttachedLayer(Swapped):
    """Methods of a layer: parts run before it, at the end of its attention, and behind it."""

    _memattn: Attachment
    _memattn_index: int

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._memattn.call_of(self, _hidden_states(args, kwargs))
        if call is not None:
            _refuse_reentrant(self)
            # an argument, so that checkpointing gives it again when it runs the layer again
            kwargs["memattn_call"] = call
        elif self._memattn.is_running:
            raise RuntimeError(
                "a decoder with attached parts must be called through the model that attach_memory "
                "was given, which collects their losses"
            )
        return super().__call__(*args, **kwargs)

    def forward(self: Any, *args: Any, memattn_call: Call | None = None, **kwargs: Any) -> Any:
        if memattn_call is None:
            return super().forward(*args, **kwargs)
        if args:
            hidden_states, args = args[0], args[1:]
        else:
            hidden_states = kwargs.pop("hidden_states")
        cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
        run = LayerRun(memattn_call, self, self._memattn_index, hidden_states, cache)
        hidden_states, _ = run.add_parts("before_attention", hidden_states)
        name = self._memattn.after_attention[self._memattn_index]
        child: Any = getattr(self, name) if run.has_parts("after_attention") else None
        if child is None:
            output = super().forward(hidden_states, *args, **kwargs)
        else:
            child._memattn_site = (run, hidden_states)
            try:
                output = super().forward(hidden_states, *args, **kwargs)
                if child._memattn_site is not None:
                    raise RuntimeError(f"{name} of a layer with attached parts was not called")
            finally:
                child._memattn_site = None
        if isinstance(output, tuple):
            output = (run.add_parts("after_mlp", output[0])[0], *output[1:])
        else:
            output = run.add_parts("after_mlp", output)[0]
        run.leave()
        return output


class AttachedChild(Swapped):
    """Methods of the module at the end of attention, whose output is added to the residual."""

    _memattn_site: tuple[LayerRun, Tensor] | None = None  # set by the layer around its own call

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site, self._memattn_site = self._memattn_site, None
        output = super().forward(*args, **kwargs)
        if site is None:
            return output
        run, residual = site
        first = output[0] if isinstance(output, tuple) else output
        _, changed = run.add_parts("after_attention", residual + first, first)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def _refuse_reentrant(layer: Any) -> None:
    """Raise ValueError for checkpointing that would lose the losses of parts."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant", True):
            must("use_reentrant", "be False for checkpointing with attached parts", True)
