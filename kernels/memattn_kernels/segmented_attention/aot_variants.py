"""What the ahead-of-time gate compiles of segmented attention.

The largest form of a kernel has all sources of keys, segments, windows, the bounds of sequences and
groups of query heads; queries are causal, and packed documents only take away the bounds'
arithmetic. The plain forms are those that most calls run: tokens alone, one query head for each key
head; causal, not causal ("full"), with a window, and with a window and sinks. The first two have
entries of their own in the tables, and candidates for these that read by tensor descriptors are
compiled as well. Sinks are a source of their own, which no other form has.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain

import triton

from memattn_kernels._common import block_length
from memattn_kernels.aot_kernel import AotKernel, taken, usual_constants
from memattn_kernels.configs import ARCHITECTURES, WIDTHS, WITH_PARTS
from memattn_kernels.segmented_attention.backward_dkdv import segmented_attention_bwd_dkdv_kernel
from memattn_kernels.segmented_attention.backward_dkdv_plain import (
    segmented_attention_bwd_dkdv_plain_kernel,
)
from memattn_kernels.segmented_attention.backward_dq import segmented_attention_bwd_dq_kernel
from memattn_kernels.segmented_attention.decode_parts import CANDIDATES as DECODE_CANDIDATES
from memattn_kernels.segmented_attention.decode_parts import (
    SUM_CONFIG,
    segmented_attention_decode_parts_kernel,
    segmented_attention_decode_sum_kernel,
)
from memattn_kernels.segmented_attention.forward import segmented_attention_fwd_kernel
from memattn_kernels.segmented_attention.forward_plain import segmented_attention_fwd_plain_kernel
from memattn_kernels.segmented_attention.plain import CANDIDATES
from memattn_kernels.tf32_candidates import candidates as tf32_candidates

# persistent and memory keys: the smallest tile
N_EXTRA = 16
TYPES = dict.fromkeys(("seq_start_ptr", "seq_end_ptr"), "*i32") | {"softcap": "fp32"}
TYPES |= dict.fromkeys(
    ("lse_ptr", "scaled_lse_ptr", "residual_ptr", "delta_ptr", "dlse_ptr"), "*fp32"
)
# partial sums
PERSISTENT_TYPES = TYPES | {"dk_ptr": "*fp32", "dv_ptr": "*fp32"}


PLAIN_FORMS = ("plain", "full", "window", "sinks", "softcap")
IN_FLOAT32 = ("", "softcap")
EXTRA_SOURCES = ("persistent", "memory")


def _form_constants(form: str) -> dict[str, object]:
    """What a form takes away: sinks and a cap from the largest form, whose name is empty."""
    if not form:
        return {"n_sinks": None, "softcap": None}
    absent = ["pk_ptr", "pv_ptr", "mk_ptr", "mv_ptr", "segments_ptr", "seq_start_ptr"]
    absent += ["seq_end_ptr", "dlse_ptr", "L"] + ["n_sinks"] * (form != "sinks")
    absent += ["softcap"] * (form != "softcap") + ["W"] * (form in ("plain", "full"))
    return dict.fromkeys(absent) | {"G": 1, "IS_CAUSAL": form != "full"}


def _shared_constants(head_dim: int, dtype: str, config: dict[str, int]) -> dict[str, object]:
    """The compile-time arguments that all kernels have."""
    constants = usual_constants(head_dim, dtype, config)
    return constants | {"IS_CAUSAL": True, "documents_ptr": None}


def _row_constants(
    function: triton.JITFunction, form: str, head_dim: int, dtype: str, config: dict[str, int]
) -> dict[str, object]:
    """Compile-time arguments of the query-stationary kernels."""
    extra = block_length(config["BLOCK_N"], N_EXTRA)
    tiles = {"BLOCK_NP": extra, "BLOCK_NM": extra, "BLOCK_NS": extra, "MEMORY_IS_CAUSAL": True}
    constants = _shared_constants(head_dim, dtype, config) | tiles | _form_constants(form)
    return taken(function, constants)


def _key_constants(
    source: str,
    form: str,
    is_grouped: bool,
    head_dim: int,
    dtype: str,
    config: dict[str, int],
) -> dict[str, object]:
    """Compile-time arguments of the key-stationary kernel for one source of keys."""
    constants = _shared_constants(head_dim, dtype, config)
    if source != "token":
        constants["BLOCK_N"] = block_length(config["BLOCK_N"], N_EXTRA)
    constants |= {"SOURCE": source, "segments_ptr": None} | _form_constants(form) | {"G": 1}
    if is_grouped:
        del constants["G"]
    return taken(segmented_attention_bwd_dkdv_kernel, constants)


def _plain_constants(
    function: triton.JITFunction,
    is_causal: bool,
    head_dim: int,
    dtype: str,
    config: dict[str, int],
) -> dict[str, object]:
    """Compile-time arguments of the kernels that read by descriptors."""
    constants = usual_constants(head_dim, dtype, config) | {"G": 1, "IS_CAUSAL": is_causal}
    return taken(function, constants | {"IS_SPECIALIZED": "specialized" in config})


def _candidates(name: str) -> Iterator[AotKernel]:
    """What reads by descriptors under the name of a table's entry, one for each candidate."""
    function = segmented_attention_fwd_plain_kernel
    tiles = dict(q_desc=("BLOCK_M", "BLOCK_D"), k_desc=("BLOCK_N", "BLOCK_D"))
    tiles |= dict(v_desc=("BLOCK_N", "BLOCK_DV"))
    if "_bwd" in name:
        function = segmented_attention_bwd_dkdv_plain_kernel
        tiles |= dict(do_desc=("BLOCK_M", "BLOCK_DV"))
        tiles |= dict.fromkeys(("scaled_lse_desc", "delta_desc"), ("BLOCK_M",))
    for part in ("descriptors", "specialized"):
        candidates = {
            arch: {
                width: config
                for width, configs in kernels[name].items()
                for config in configs
                if ("specialized" in config) == (part == "specialized")
            }
            for arch, kernels in CANDIDATES.items()
        }
        if any(candidates.values()):
            yield AotKernel(
                name=name,
                part=part,
                function=function,
                constants=partial(_plain_constants, function, name.endswith("_causal")),
                in_float32=False,
                candidates=candidates,
                tiles=tiles,
                types=TYPES,
            )


def _tf32() -> Iterator[AotKernel]:
    """Plain causal attention in float32 by TF32 products, one for each candidate of a table."""
    rows = segmented_attention_fwd_kernel, segmented_attention_bwd_dq_kernel
    kernels = [(function, partial(_row_constants, function, "plain")) for function in rows]
    keys = partial(_key_constants, "token", "plain", False)
    kernels.append((segmented_attention_bwd_dkdv_kernel, keys))
    names = ("fwd_causal", "bwd_dq", "bwd_dkdv_causal")
    for name, (function, constants) in zip(names, kernels, strict=True):
        name = f"segmented_attention_{name}"
        found = {
            (arch, width): tf32_candidates(arch, name, width)
            for arch in ARCHITECTURES
            for width in WIDTHS
        }
        for index in range(max(map(len, found.values()))):
            chosen: dict[str, dict[int, dict[str, int]]] = {}
            for (arch, width), configs in found.items():
                if index < len(configs):
                    chosen.setdefault(arch, {})[width] = configs[index]
            yield AotKernel(
                name=name,
                part=f"plain-tf32-{index}",
                function=function,
                constants=constants,
                candidates=chosen,
                candidates_kind="float",
                types=TYPES,
            )


def _decode_parts() -> Iterator[AotKernel]:
    """Few queries whose keys are shared, largest and plain, and what adds up the parts."""
    function = segmented_attention_decode_parts_kernel
    sums = dict.fromkeys(("acc_ptr", "l_ptr", "m_ptr"), "*fp32")
    # how long a part is, is no part of the code
    for block, config in {config["BLOCK_N"]: config for config in DECODE_CANDIDATES}.items():
        for form in ("", "plain", "sinks", "softcap"):
            yield AotKernel(
                name=WITH_PARTS,
                part=f"parts-{block}" + f"-{form}" * bool(form),
                function=function,
                constants=partial(_row_constants, function, form),
                in_float32=False,
                candidates=dict.fromkeys(ARCHITECTURES, dict.fromkeys((64, 128), config)),
                types=TYPES | sums,
            )
    yield AotKernel(
        name=f"{WITH_PARTS}_sum",
        function=segmented_attention_decode_sum_kernel,
        constants=lambda head_dim, dtype, config: taken(
            segmented_attention_decode_sum_kernel,
            usual_constants(head_dim, dtype, config | {"BLOCK_N": 0}),
        ),
        pinned=dict.fromkeys(("half", "float"), SUM_CONFIG),
        types=TYPES | sums,
    )


KERNELS = (
    *(
        AotKernel(
            name=f"segmented_attention_{name}",
            part=form,
            function=function,
            constants=partial(_row_constants, function, form),
            in_float32=form in IN_FLOAT32,
            types=TYPES,
        )
        for name, function, forms in (
            ("fwd", segmented_attention_fwd_kernel, ("", "window", "sinks", "softcap")),
            ("fwd_dense", segmented_attention_fwd_kernel, ("full",)),
            ("fwd_causal", segmented_attention_fwd_kernel, ("plain",)),
            ("decode", segmented_attention_fwd_kernel, ("", "plain", "sinks", "softcap")),
            ("bwd_dq", segmented_attention_bwd_dq_kernel, ("", *PLAIN_FORMS)),
        )
        for form in forms
    ),
    *(
        AotKernel(
            name=f"segmented_attention_bwd_dkdv{suffix}",
            part=f"{source}-{form}" if form else source,
            function=segmented_attention_bwd_dkdv_kernel,
            constants=partial(_key_constants, source, form, suffix == "_grouped"),
            in_float32=form in IN_FLOAT32,
            types=PERSISTENT_TYPES if source == "persistent" else TYPES,
        )
        for suffix, source, forms in (
            ("", "token", ("", "window", "sinks")),
            ("_dense", "token", ("full",)),
            ("_causal", "token", ("plain",)),
            ("_grouped", "token", ("", *PLAIN_FORMS)),
            *((suffix, source, ("",)) for suffix in ("", "_grouped") for source in EXTRA_SOURCES),
        )
        for form in forms
    ),
    *_decode_parts(),
    *_tf32(),
    *chain.from_iterable(map(_candidates, CANDIDATES["sm_90"])),
)
