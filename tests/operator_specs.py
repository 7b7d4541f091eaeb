"""The operators that the shared tests call: to add one is to write its spec and to list it here."""

from operator_contract import OperatorSpec
from specs_branch_attention import BRANCHES
from specs_chapter_attention import CHAPTERS
from specs_future_attention import FUTURE, FUTURE_LOSS
from specs_neural_memory import MEMORY
from specs_segmented_attention import SEGMENTED
from specs_task_masked_attention import TASK_MASKED

SPECS = [SEGMENTED, FUTURE, FUTURE_LOSS, TASK_MASKED, CHAPTERS, BRANCHES, MEMORY]


def having(backend: str) -> list[OperatorSpec]:
    """The operators that have a backend."""
    return [spec for spec in SPECS if backend in spec.backends]
