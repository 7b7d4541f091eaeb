"""Runs a causal language model as transformers calls it, for the audit."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOW = (torch.float16, torch.bfloat16, torch.float32)
NARROWING = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
CACHES = ("past_key_values", "cache_params")


class Probe:
    """A private copy of a model, with noise on its weights, in evaluation mode.

    Args:
        model: The model; it stays as it is.
        dtype: Compute everything in this dtype; None keeps the model's own dtypes and backend.
        seed: Seed of the noise.
        noise: Standard deviation of the noise on every floating parameter.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, seed: int, noise: float):
        self.model = copy.deepcopy(model).eval()
        self.exact = dtype == torch.float64
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        self.parameters = inspect.signature(base.forward).parameters
        self.cache_name = next((name for name in CACHES if name in self.parameters), None)
        first = next(self.model.parameters())
        self.device = first.device
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.is_floating_point():
                    change = noise * torch.randn(parameter.shape, generator=generator)
                    parameter.add_(change.to(parameter))
        self.config = base.config
        if dtype is not None:
            self.model.to(dtype)
            _use_plain_backends(self.model, base)
        self.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def experts(self) -> str | None:
        """How transformers multiplies the experts of a mixture."""
        return getattr(self.config, "_experts_implementation", None)

    def takes(self, name: str) -> bool:
        """Whether ``forward`` has this argument."""
        return name in self.parameters

    def __call__(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits ``[B, T, vocab_size]``, and the cache (None without ``use_cache``).

        ``attention_mask`` covers the cached tokens too, as transformers wants it.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
            if self.takes("position_ids"):
                positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
                inputs["position_ids"] = positions[:, -input_ids.shape[1] :]
        packing = {"cu_seqlens": cu_seqlens, "position_ids": position_ids}
        inputs |= {name: given for name, given in packing.items() if given is not None}
        if self.takes("use_cache"):
            inputs["use_cache"] = use_cache
        if cache is not None and self.cache_name is not None:
            inputs[self.cache_name] = cache
        with torch.no_grad(), _in_float64() if self.exact else contextlib.nullcontext():
            output = self.model(**inputs)
        new_cache = (
            getattr(output, self.cache_name, None) if self.cache_name and use_cache else None
        )
        return output.logits, new_cache

    def first_difference(self, one: dict[str, Any], other: dict[str, Any], compared: Tensor) -> str:
        """Name of the first module whose output differs at the ``compared [B, T]`` positions."""
        names = {module: name for name, module in self.model.named_modules()}
        outputs: list[tuple[str, Tensor]] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) and len(output):
                output = next(iter(output.values() if isinstance(output, dict) else output))
            if isinstance(output, Tensor) and output.shape[:2] == compared.shape:
                outputs.append((names[module], output[compared].clone()))

        hooks = [module.register_forward_hook(record) for module in names]
        try:
            self(**one)
            before = outputs.copy()
            outputs.clear()
            self(**other)
        finally:
            for hook in hooks:
                hook.remove()
        # a module that ran in one of the two runs only, such as an expert, shifts the list
        for (name, a), (other_name, b) in zip(before, outputs, strict=False):
            if name != other_name or not torch.equal(a, b):
                return name
        return ""


class _Float64Mode(TorchFunctionMode):
    """Turns a request for a lower dtype into one for float64, as in norms that upcast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # every access to a tensor comes by here
        kwargs = kwargs or {}
        if func is torch.Tensor.view:  # with a dtype it reads bits, such as those of kept scales
            return func(*args, **kwargs)
        if func in NARROWING:
            func = torch.Tensor.double
        for arg in args:
            if type(arg) is torch.dtype:
                args = tuple(torch.float64 if _is_low(other) else other for other in args)
                break
        if kwargs:
            kwargs = {k: torch.float64 if _is_low(v) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _is_low(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in LOW


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Compute in float64 everything that would be in a lower dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Mode():
            yield
    finally:
        torch.set_default_dtype(before)


def _use_plain_backends(model: nn.Module, base: Any) -> None:
    """Leave the backends that have no float64."""
    implementation = getattr(base.config, "_attn_implementation", None) or ""
    if "flash" in implementation or "flex" in implementation:
        base.set_attn_implementation("sdpa")
    if getattr(base.config, "_experts_implementation", None) is not None:
        # a product for each token and expert; the others multiply all tokens of an expert at once,
        # and how that rounds depends on how many there are. Models without experts keep theirs
        base.set_experts_implementation("batched_mm")
    module: Any
    for module in model.modules():
        # operators of this package: "auto" is the reference for float64
        if getattr(module, "backend", None) in ("triton", "cpp"):
            module.backend = "auto"
