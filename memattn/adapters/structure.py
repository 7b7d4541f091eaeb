"""Where the layers of a Hugging Face decoder are, and where in each of them attention ends."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memattn.checks import must
from memattn.parts import Sizes


class Structure(NamedTuple):
    """The structure that ``look_at`` found in a model."""

    layers: list[nn.Module]
    stations: list[dict[str, str]]  # of each layer, by place: the child after which parts run
    output_type: type  # of the model's forward
    sizes: Sizes


def text_config(model: Any) -> Any:
    """The configuration of the decoder of a model."""
    return model.config.get_text_config(decoder=True)


def model_sizes(model: Any) -> Sizes:
    """The sizes of a model that parts depend on.

    Raises:
        ValueError: If the configuration does not say how many layers, heads or features there are.
    """
    config = text_config(model)

    def read(name: str, default: int | None = None) -> int:
        value = getattr(config, name, None)
        value = default if value is None else value
        if not isinstance(value, int):
            must(f"model.config.{name}", "be a number, as in configurations of decoders", value)
        return value

    hidden_size, heads = read("hidden_size"), read("num_attention_heads")
    return Sizes(
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=read("num_key_value_heads", heads),
        head_dim=read("head_dim", hidden_size // heads),
        num_layers=read("num_hidden_layers"),
        max_positions=read("max_position_embeddings", 1 << 20),
        intermediate_size=read("intermediate_size", 4 * hidden_size),
        norm_eps=_norm_eps(config),
    )


def _norm_eps(config: Any) -> float:
    """The epsilon of the model's own norms."""
    names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
    found = (getattr(config, name, None) for name in names)
    return next((eps for eps in found if isinstance(eps, float)), 1e-6)


def find_layers(model: nn.Module, num_layers: int) -> list[nn.Module]:
    """The decoder layers: the one list of ``num_hidden_layers`` modules that have children.

    Raises:
        ValueError: If there is no such list, or more than one.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(next(layer.children(), None) is not None for layer in module)
    ]
    if len(found) != 1:
        requirement = f"have one list of its num_hidden_layers={num_layers} decoder layers"
        must("model", requirement, f"{len(found)} in {type(model).__name__}")
    return list(found[0])


def look_at(model: Any) -> Structure:
    """Find the layers of a model, and where attention ends in each, by one call of the model.

    In that call each child of a layer has noise added to its output. Attention ends with the child
    whose output, with its noise, and the input of the layer add up bit for bit to the input of a
    later child, the norm before the MLP. That is the attention module itself, or a norm of its
    output.

    Raises:
        ValueError: If the layers are not found, or a weight is on the meta device.
    """
    sizes = model_sizes(model)
    layers = find_layers(model, sizes.num_layers)
    if any(parameter.is_meta for parameter in model.parameters()):
        must("model", "have its weights loaded", "a model on the meta device")
    recorders = [_Recorder(layer) for layer in layers]
    vocab = text_config(model).vocab_size
    tokens = torch.arange(1, 4)[None] % vocab
    with in_evaluation_mode(model), contextlib.ExitStack() as stack, torch.no_grad():
        for recorder in recorders:
            stack.enter_context(recorder)
        embedding = model.get_input_embeddings()
        output = model(
            input_ids=tokens.to(embedding.weight.device), use_cache=False, return_dict=True
        )
    stations = [recorder.stations() for recorder in recorders]
    return Structure(layers, stations, type(output), sizes)


class _Recorder:
    """Records inputs and outputs of a layer's children, and adds noise to the outputs."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.entry: Tensor | None = None
        self.calls: list[tuple[str, Tensor | None, Tensor | None]] = []  # child, input, output
        self.generator = torch.Generator().manual_seed(0)

    def __enter__(self) -> None:
        hook = self.layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.handles = [hook]
        for name, child in self.layer.named_children():

            def note(child: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name):
                return self._note(name, args, kwargs, output)

            self.handles.append(child.register_forward_hook(note, with_kwargs=True))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.entry = _first_tensor(args, kwargs)

    def _note(self, name: str, args: Any, kwargs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        noisy = None
        if isinstance(first, Tensor) and first.is_floating_point():
            noise = torch.randn(first.shape, generator=self.generator)
            noisy = first + noise.to(first)
        self.calls.append((name, _first_tensor(args, kwargs), noisy))
        if noisy is None:
            return None
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    def stations(self) -> dict[str, str]:
        """The end of attention, and attention itself: the module of several that leads there."""
        end = self._end_of_attention()
        if end is None:
            return {}
        found, at = {"after_attention": end}, end
        while next(getattr(self.layer, at).children(), None) is None:
            given = next(given for name, given, _ in self.calls if name == at)
            before = [n for n, _, out in self.calls if n != at and _is_equal(out, given)]
            if not before:
                return found
            at = before[0]
        return found | {"beside_attention": at}

    def _end_of_attention(self) -> str | None:
        """The child whose output and the layer's input are the input of a later child."""
        if self.entry is None:
            return None
        for later, (_, given, _) in enumerate(self.calls):
            for name, _, output in self.calls[:later]:
                if (
                    given is not None
                    and output is not None
                    and given.shape == output.shape == self.entry.shape
                    and torch.equal(self.entry + output, given)
                ):
                    return name
        return None


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether neither is None and both have the same shape and values."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among the arguments of a module, or None."""
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, Tensor) else None


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which each module is in evaluation mode; its own mode is restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
