"""Families of models of transformers under memattn_segmented against eager attention.

``python tests/transformers_families.py`` (``make transformers-families``) makes a tiny model with
random weights of every family that predicts tokens, gives it the same calls with both attentions in
float64, and writes ``docs/results/transformers_families.md``. Each family runs in a process of its
own with a time limit. What was found is kept in ``build/``, so that a run that was cut off goes on;
families that are named run again. ``--page`` only writes the page.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_configs import tiny_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.auto import modeling_auto

import memattn.models  # registers it
from memattn.models.hf_choice import NAME

assert memattn.models
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "transformers_families.md"
FOUND = ROOT / "build" / f"families-{transformers.__version__}.jsonl"
# of several modalities, given text
SEVERAL = """
    aria aya_vision cohere2_vision gemma3 gemma4 glm4v idefics3 internvl lfm2_vl llava
    llava_next mistral3 mllama paligemma qwen2_vl qwen2_5_vl qwen3_vl smolvlm
"""
EXACT = 1e-10  # as tests/hf_attention_factories.py
B, T, WINDOW = 3, 23, 4
USES = ("forward", "gradients", "padding", "holes", "window", "generation")
WORDS = {"match": "match", "refused": "refused", "differs": "**differs**", "eager": "–"}
HEAD = """# Families of transformers under memattn_segmented

`make transformers-families` wrote this page with transformers {version}. It makes a tiny model with
random weights of every family that predicts tokens, with each kind of layer that its default
configuration has, and gives it the same calls with eager attention and with `memattn_segmented`, in
float64 (also what models compute in float32). "match" is no difference above 1e-10. The uses are a
forward pass, the gradients of all weights, rows with padding on both sides, rows with holes, a
window of {window} keys set by `memattn_window_size` where a layer has none of its own, and greedy
generation from padded prompts with a cache. "–" is a use that eager attention has not, or no layer
for the window. Numbers are of the reasons below.

Of {families} families {match} match wherever they are not refused, {refused} are refused, and
{unbuilt} were not built or do not run with eager attention.

"""


def families() -> dict[str, str]:
    """The class of each family that predicts tokens, by its type; each class once."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    several = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    types: dict[str, str] = {}  # of a type and that of its text the later one
    for name, cls in [*causal.items(), *((name, several[name]) for name in SEVERAL.split())]:
        if not name.startswith("memattn"):
            types[cls] = name
    return {name: cls for cls, name in sorted(types.items(), key=lambda item: item[1])}


class Float64(TorchFunctionMode):
    """Computes in float64 what models compute in float32 for the sake of lower dtypes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def double(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        kwargs = {name: double(x) for name, x in (kwargs or {}).items()}
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(double, args), **kwargs)


def windowed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> Any:
    """Eager attention of a model within a window, where a layer has none of its own."""
    kinds = getattr(module.config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    chunked = kinds is not None and layer is not None and kinds[layer] == "chunked_attention"
    if kwargs.get("sliding_window") is None and not chunked:
        columns = torch.arange(key.shape[2])
        far = columns[-query.shape[2] :, None] - columns >= WINDOW
        attention_mask = torch.where(far, torch.finfo(value.dtype).min, attention_mask)
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return eager(module, query, key, value, attention_mask, **kwargs)


def outputs(model: Any, **inputs: Any) -> Tensor:
    """Logits ``[B, T, V]``."""
    return model(**inputs, use_cache=False).logits


def make_calls() -> dict[str, Callable[[Any], tuple[Tensor, Tensor]]]:
    """What is asked of a model: values, and which of the columns they are of count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 80, (B, T), generator=generator)
    every = torch.ones(B, T, dtype=torch.bool)
    padding, holes = every.clone(), every.clone()
    padding[0, :4], padding[1, T - 3 :] = False, False
    holes[0, 3], holes[1, 5:8], holes[2, :2] = False, False, False

    def masked(model: Any, present: Tensor) -> tuple[Tensor, Tensor]:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": present.long()}
        if _counts(model):
            inputs["position_ids"] = (present.cumsum(1) - 1).clamp(min=0)
        return outputs(model, **inputs), present

    def gradients(model: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            model.zero_grad()
            outputs(model, input_ids=ids).square().mean().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        flat = torch.cat(grads)
        return flat / flat.abs().max(), torch.ones_like(flat, dtype=torch.bool)

    def generation(model: Any) -> tuple[Tensor, Tensor]:
        begun = padding[:, : T - 3]
        out = model.generate(
            ids[:, : T - 3], attention_mask=begun.long(), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        logits = torch.stack(out.logits, 1)
        return logits, torch.ones(logits.shape[:2], dtype=torch.bool)

    return {
        "forward": lambda model: (outputs(model, input_ids=ids), every),
        "gradients": gradients,
        "padding": lambda model: masked(model, padding),
        "holes": lambda model: masked(model, holes),
        "window": lambda model: (outputs(model, input_ids=ids), every),
        "generation": generation,
    }


def _counts(model: Any) -> bool:
    """Whether a model takes positions, so that those of rows with holes can be said."""
    code = model.forward.__code__
    return "position_ids" in code.co_varnames[: code.co_argcount]


def attempt(call: Callable[[Any], tuple[Tensor, Tensor]], model: Any) -> Any:
    """What a call returns, or what it raises."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), Float64():
            return call(model)
    except Exception as error:  # of any kind: it is what the table says
        return error
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def window(model: Any) -> Iterator[None]:
    """A window of the package's own for the time being."""
    model.config.memattn_window_size = WINDOW
    yield
    model.config.memattn_window_size = None


def use(model: Any, implementation: str) -> None:
    """Choose the attention of a model, of its text if there are others."""
    text = model.config.get_text_config(decoder=True)
    parts = [n for n, value in vars(model.config).items() if value is text]
    model.set_attn_implementation({parts[0]: implementation} if parts else implementation)


def compare(name: str) -> dict[str, Any]:
    """The row of a family: what came of each use, and why where it is no match."""
    cls = families()[name]
    row: dict[str, Any] = {"family": name, "class": cls}
    try:
        torch.manual_seed(0)
        wanted, config = getattr(transformers, cls), tiny_config(name)
        if not isinstance(config, wanted.config_class):
            config = config.get_text_config()
        model: Any = wanted._from_config(config, experts_implementation="eager")
        model = model.double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data, mean=parameter.data.mean().item(), std=0.1)
        use(model, "eager")
    except Exception as error:
        return row | {"unbuilt": _say(error)}
    calls = make_calls()
    expected = {use_: attempt(call, model) for use_, call in calls.items() if use_ != "window"}
    if isinstance(expected["forward"], Exception):
        return row | {"unbuilt": _say(expected["forward"])}
    use(model, "eager_in_window")
    expected["window"] = attempt(calls["window"], model)
    try:
        use(model, NAME)
    except NotImplementedError as error:
        return row | {"refused": _say(error)}
    uses, why = {}, {}
    for use_ in USES:
        with window(model) if use_ == "window" else _nothing():
            actual = attempt(calls[use_], model)
        uses[use_], why[use_] = judge(expected[use_], actual)
    if isinstance(expected["window"], tuple) and torch.equal(
        expected["window"][0], expected["forward"][0]
    ):
        uses["window"], why["window"] = "eager", "no layer whose window is the package's to set"
    return row | {"uses": uses, "why": {use_: text for use_, text in why.items() if text}}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def judge(expected: Any, actual: Any) -> tuple[str, str]:
    """One of ``WORDS``, and why."""
    if isinstance(expected, Exception):
        return "eager", _say(expected)
    if isinstance(actual, NotImplementedError | ValueError):
        return "refused", _say(actual)
    if isinstance(actual, Exception):
        return "differs", f"raises {_say(actual)}"
    (wanted, present), (got, _) = expected, actual
    error = (wanted - got)[present].abs().max().item()
    return ("match", "") if error <= EXACT else ("differs", f"by {error:.0e}")


def _say(error: BaseException) -> str:
    """The last line of an error, without what all of the package's have in common."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines or [type(error).__name__])[-1]
    for common in (f' with attn_implementation="{NAME}"', f', for attn_implementation="{NAME}"'):
        text = text.replace(common, "")
    return text.removesuffix('; "eager" takes it')[:200]


def words(row: dict[str, Any]) -> list[str]:
    """What the page says of each use of a family."""
    if "unbuilt" in row or "refused" in row:
        return ["not built" if "unbuilt" in row else "refused"] * len(USES)
    return [WORDS[row["uses"][use_]] for use_ in USES]


def page_of(found: dict[str, dict[str, Any]]) -> str:
    """The page of the rows of all families."""
    reasons: dict[str, int] = {}
    lines = [
        f"| family | class | {' | '.join(USES)} |",
        f"|{'---|' * (len(USES) + 2)}",
    ]
    rows = [found[name] for name in families() if name in found]
    for row in rows:
        cells = words(row)
        for i, use_ in enumerate(USES):
            why = row.get("unbuilt") or row.get("refused") or row["why"].get(use_)
            if why:
                # the class that is refused stands in the row, and windows differ
                why = re.sub(r"(can choose), got .*| of \d+$", r"\1", why)
                cells[i] += f" {reasons.setdefault(why, len(reasons) + 1)}"
        lines.append(f"| {row['family']} | `{row['class']}` | {' | '.join(cells)} |")
    kinds = ["not built" if "unbuilt" in row else words(row)[0] for row in rows]
    counts = {"match": "match", "refused": "refused", "unbuilt": "not built"}
    head = HEAD.format(
        version=transformers.__version__,
        window=WINDOW,
        families=len(rows),
        **{name: kinds.count(kind) for name, kind in counts.items()},
    )
    texts = [f"{number}. {why.replace('<', '&lt;')}" for why, number in reasons.items()]
    return head + "\n".join([*lines, "", "## Reasons", "", *texts, ""])


def run_apart(name: str, limit: float) -> dict[str, Any]:
    """``compare`` in a process of its own, ended after ``limit`` seconds."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        send.send(compare(name))

    process = context.Process(target=work)
    process.start()
    send.close()
    row: dict[str, Any] = {"family": name, "class": families()[name]}
    if receive.poll(limit):
        try:
            row = receive.recv()
        except EOFError:
            row["unbuilt"] = "its process ended"
    else:
        row["unbuilt"] = f"not within {limit:.0f} seconds"
        process.kill()
    process.join()
    return row


def read_found() -> dict[str, dict[str, Any]]:
    """The last row of each family."""
    lines = FOUND.read_text().splitlines() if FOUND.is_file() else []
    return {row["family"]: row for row in map(json.loads, lines)}


def main() -> None:
    """Run the families that are named or have not run, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families to run again; else all that are left")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a family")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    found = read_found()
    names = options.names or [name for name in families() if name not in found]
    FOUND.parent.mkdir(exist_ok=True)
    for name in () if options.page else names:
        row = run_apart(name, options.limit)
        with FOUND.open("a") as file:
            print(json.dumps(row), file=file)
        print(json.dumps(row), flush=True)  # noqa: T201
    PAGE.write_text(page_of(read_found()))


AttentionInterface.register("eager_in_window", windowed_attention)
AttentionMaskInterface.register("eager_in_window", eager_mask)
if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    main()
