"""Products of tiles, float32 in the precision that a launch asks for.

Tensor cores of NVIDIA cards take float32 as TF32, whose fraction has 10 of its 23 bits. Of two
float32 numbers, each the sum of two TF32 numbers, three of the four products make up nearly all of
the product: ``"tf32x3"``. Without tensor cores, as ``"ieee"``, a product takes as many steps as it
has multiplications.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton import knobs

# of a table's entry: TF32 products for one of float32
TF32_PRODUCTS = "tf32_products"
PRECISIONS = {0: "ieee", 1: "tf32", 3: "tf32x3"}
# the option of a launch that says it, to Triton and to ``dot``
OPTION = "default_dot_input_precision"
# whether functions of our own can read options of the launch: an internal of Triton
CAN_CHOOSE = (
    not knobs.runtime.interpret
    and hasattr(tl.core, "builtin")
    and "_semantic" in inspect.signature(tl.dot).parameters
)


def launch_precision(config: Mapping[str, Any]) -> dict[str, str]:
    """The option of a launch with this configuration, by name; none where it is not read."""
    return {OPTION: PRECISIONS[config.get(TF32_PRODUCTS, 0)]} if CAN_CHOOSE else {}


if CAN_CHOOSE:

    @tl.core.builtin
    def dot(x, y, acc=None, _semantic=None):
        """``x @ y``, plus ``acc``, with float32 sums; the launch says how for float32 inputs."""
        precision = getattr(_semantic.builder.options, OPTION)
        return tl.dot(x, y, acc, input_precision=precision, _semantic=_semantic)

else:

    @triton.jit
    def dot(x, y, acc=None):
        """``x @ y``, plus ``acc``, with float32 sums."""
        return tl.dot(x, y, acc, input_precision="ieee")
