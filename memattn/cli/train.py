"""``memattn train``."""

import sys

from memattn.train.config import DataConfig, ModelConfig, TrainConfig, TrainingConfig


def train(
    model: ModelConfig = ModelConfig(preset="vanilla"),  # noqa: B008 - frozen
    data: DataConfig = DataConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    resume: bool | str = False,
    progress: bool = True,
) -> int:
    """Train a causal language model: a preset with new weights, or a pretrained model.

    The run folder gets config.yaml, metrics.csv, checkpoints/ and model/. Several processes:
    accelerate launch --num_processes 2 -m memattn train --config FILE. Ctrl-C leaves a checkpoint
    and exits with code 130.

    Args:
        model: The model.
        data: The text.
        training: Optimisation and output.
        resume: true continues from the newest checkpoint of the run folder, or starts if there is
            none; a path continues from that checkpoint.
        progress: Show a progress bar.
    """
    from memattn.train.distributed import leave_process_group
    from memattn.train.loop import train as run

    config = TrainConfig(model=model, data=data, training=training)
    try:
        result = run(config, resume=resume, progress=progress)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"memattn train: {interrupt or 'interrupted'}\n")
        return 130
    leave_process_group()
    held_out = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
    sys.stdout.write(
        f"{result.model_dir}: step {result.step}, {result.tokens:,} tokens, "
        f"loss {result.loss:.4f}{held_out}, {result.tokens_per_second:,.0f} tokens/s\n"
    )
    return 0
