"""Methods that run parts in a decoder layer and in its child at the end of attention."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from memattn.adapters.attachment import Attachment
from memattn.adapters.base_attention import half_angles
from memattn.adapters.call import Beside, Call, LayerRun
from memattn.adapters.swap import Swapped
from memattn.checks import must


class AttachedLayer(Swapped):
    """Methods of a layer that run parts before it, at the end of its attention, and after it."""

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
        run.residual = hidden_states
        children = self._children_at_work(run)
        try:
            output = super().forward(hidden_states, *args, **kwargs)
            for name, child in children.items():
                if child._memattn_site is not None:
                    raise RuntimeError(f"{name} of a layer with attached parts was not called")
        finally:
            for child in children.values():
                child._memattn_site = None
        if isinstance(output, tuple):
            output = (run.add_parts("after_mlp", output[0])[0], *output[1:])
        else:
            output = run.add_parts("after_mlp", output)[0]
        run.leave()
        return output

    def _children_at_work(self: Any, run: LayerRun) -> dict[str, Any]:
        """The children after which parts run in this call; each gets its places of this call."""
        children = {}
        for place, name in self._memattn.stations[self._memattn_index].items():
            if run.has_parts(place):
                child = children.setdefault(name, getattr(self, name))
                child._memattn_site = (run, (*(child._memattn_site or (run, ()))[1], place))
        return children


class AttachedChild(Swapped):
    """Methods of attention and of the module at its end, whose output is added to the residual."""

    # set by the layer around its own call: the run, and the places that are here
    _memattn_site: tuple[LayerRun, tuple[str, ...]] | None = None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site, self._memattn_site = self._memattn_site, None
        output = super().forward(*args, **kwargs)
        if site is None:
            return output
        run, places = site
        changed = output[0] if isinstance(output, tuple) else output
        if "beside_attention" in places:
            beside = Beside(changed, self, half_angles(kwargs))
            changed = run.beside_attention(_hidden_states(args, kwargs), beside)
        if "after_attention" in places:
            _, changed = run.add_parts("after_attention", run.residual + changed, changed)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def _refuse_reentrant(layer: Any) -> None:
    """Raise ValueError for reentrant checkpointing, which would lose the losses of parts."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant", True):
            must("use_reentrant", "be False for checkpointing with attached parts", True)
