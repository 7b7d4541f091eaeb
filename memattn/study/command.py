"""``memattn study``."""

from typing import Any, Literal

from memattn.study.config import CompareConfig, StudyConfig
from memattn.train.config import DataConfig, TrainingConfig

_DEFAULT = StudyConfig()


def study(
    system: Literal["future"],
    out: str = _DEFAULT.out,
    compare: CompareConfig = _DEFAULT.compare,
    sizes: dict[str, Any] = _DEFAULT.sizes,
    future_options: dict[str, Any] = _DEFAULT.future_options,
    data: DataConfig = _DEFAULT.data,
    training: TrainingConfig = _DEFAULT.training,
    max_minutes: float | None = None,
) -> int:
    """Compare a system with a plain decoder at equal parameters, over several seeds.

    Trains each model with each seed, prints tables with mean and standard deviation and with the
    paired difference to the baseline, and writes results.json, results.csv, results.md and
    curves.png. Ctrl-C leaves a checkpoint: the same command goes on from there, and finished runs
    are kept.

    Args:
        system: What is studied: future, attention with learned keys for the positions ahead.
        out: Folder of the runs and results.
        compare: The models that are compared.
        sizes: Sizes of every model, keywords of the presets.
        future_options: Further keywords of the future models, such as start_layer.
        data: The text, of which a part must be held out.
        training: Optimisation; output_dir and seed are left to the study.
        max_minutes: Stop with a checkpoint after so many minutes; the same command goes on.
    """
    from memattn.study.run import run_study

    config = StudyConfig(
        out=out,
        compare=compare,
        sizes=sizes,
        future_options=future_options,
        data=data,
        training=training,
    )
    run_study(config, max_minutes=max_minutes)
    return 0
