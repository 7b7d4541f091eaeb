"""The router of chapters, forward and backward.

The definition is memattn.reference.chapter_router. Both passes go through the rows in chunks: a
product makes the logits of a chunk, one program a row makes of them what is wanted. The logits of a
chunk are all that is ever stored of the size (rows x chapters), and nothing of it is kept for the
backward, which computes the same bits again.
"""

import torch
from torch import Tensor

from memattn_kernels._common import IS_INTERPRETED
from memattn_kernels._operator import register
from memattn_kernels._router import REGISTRATION, without_saved
from memattn_kernels.chapter_router.launch import MAX_CHAPTERS, launch_backward, launch_forward
from memattn_kernels.signatures import ChapterRouterArgs

_operator = register(
    "memattn_kernels::chapter_router",
    ChapterRouterArgs,
    **REGISTRATION,
    empty_gradient=lambda _, tensor: tensor.new_empty(tensor.shape),
    forward=launch_forward,
    backward=launch_backward,
)


def chapter_router(args: ChapterRouterArgs) -> tuple[Tensor, ...]:
    """Return indices, weights, the three losses, count, load and entropy.

    Raises:
        NotImplementedError: If there are more chapters than a program holds.
    """
    if args.weight.shape[0] > MAX_CHAPTERS:
        raise NotImplementedError(
            f'weight must have at most {MAX_CHAPTERS} chapters for backend "triton", got '
            f'{args.weight.shape[0]}; backend "reference" takes it'
        )
    if IS_INTERPRETED and torch.bfloat16 in (args.hidden.dtype, args.weight.dtype):
        # the interpreter computes bfloat16 wrongly
        bias = None if args.bias is None else args.bias.float()
        args = args._replace(hidden=args.hidden.float(), weight=args.weight.float(), bias=bias)
    return without_saved(_operator(*args))
