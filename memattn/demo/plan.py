"""How many steps every preset of the demo gets: planned, measured and planned again.

Training goes stage by stage: the next one begins when all presets have done the last one. The first
stage is the warm-up of the learning rate, which is the same for every number of steps: it measures
each preset at its real work, and nothing is decided before it. Then the number of steps is what
fits into the time, and at the end of each stage it is cut to what fits still, should the machine
have become slower. All presets go through the same stages, so that tokens and learning rates are
equal at every step.
"""

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memattn.files import write_text

WARMUP_STEPS = 20
STAGES = 4  # after the warm-up
EVALUATIONS = 4  # of the held-out part in each run, where they are a fifth of its time or less
MAX_EPOCHS = 4.0  # more would show how well a text is learned by heart


@dataclass(frozen=True)
class StageTime:
    """What one preset took for one stage.

    Attributes:
        seconds: All of it, by the clock.
        seconds_per_token: The training steps alone.
    """

    seconds: float
    seconds_per_token: float


@dataclass
class Stage:
    """A part of every run.

    Attributes:
        stop: Step up to which it trains.
        steps: Steps of the whole run as planned then, over which the learning rate falls.
        evaluate: Whether the held-out loss is measured at its end.
        times: Those that are done, by preset.
    """

    stop: int
    steps: int
    evaluate: bool
    times: dict[str, StageTime] = field(default_factory=dict)


@dataclass
class Plan:
    """The stages so far, and what they rest on; kept in a file, so that a demo can go on.

    Attributes:
        settings: The configuration of the demo.
        step_tokens: Tokens in a step.
        train_tokens: Tokens to train on.
        held_out_tokens: Tokens held out.
        held_out_bytes: Bytes of their text.
        device: Where it runs.
        processes: How many presets train at a time.
        evaluations: Held-out evaluations in every run, decided after the warm-up.
        stages: The warm-up, and what was planned since.
    """

    settings: dict[str, Any]
    step_tokens: int
    train_tokens: int
    held_out_tokens: int
    held_out_bytes: int
    device: str
    processes: int = 1
    evaluations: int = EVALUATIONS
    stages: list[Stage] = field(
        default_factory=lambda: [Stage(WARMUP_STEPS, 2 * WARMUP_STEPS, evaluate=False)]
    )

    @property
    def steps(self) -> int:
        """Steps of every run, as planned now."""
        return self.stages[-1].steps

    @property
    def tokens(self) -> int:
        """Tokens of every run, as planned now."""
        return self.steps * self.step_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the last stage ends the runs."""
        return self.stages[-1].stop == self.steps

    def extend(self, presets: Collection[str], seconds: float) -> None:
        """Add the next stage, once all presets have done the last one.

        Args:
            presets: Names of the presets.
            seconds: Time for all training, from the beginning.
        """
        last, number = self.stages[-1], len(self.stages)
        left = STAGES - number + 1
        spent = sum(
            self._together(taken.seconds for taken in stage.times.values()) for stage in self.stages
        )
        # of all presets together, each at its own speed
        seconds_per_token = self._together(last.times[p].seconds_per_token for p in presets)
        overhead = self._together(self._overhead(self.stages[0].times[p]) for p in presets)
        tokens = (seconds - spent - left * overhead) / seconds_per_token
        evaluation = self.held_out_tokens / 3  # a forward pass is a third of a step's work
        if number == 1:
            share = 0.2 * tokens / max(evaluation, 1.0)
            self.evaluations = max(1, min(EVALUATIONS, int(share)))
        tokens -= evaluation * sum(self._evaluates(n) for n in range(number, STAGES + 1))

        # at least so many that the learning rate falls and does not break off, and never more than
        # were planned, or it would rise again
        least, most = last.stop + math.ceil(0.1 * last.stop), last.steps
        if number == 1:
            most = int(MAX_EPOCHS * self.train_tokens / self.step_tokens)
        else:
            least = min(least, most)
        steps = max(least, min(most, last.stop + int(tokens / self.step_tokens)))
        stop = steps if steps == least else last.stop + math.ceil((steps - last.stop) / left)
        self.stages.append(Stage(stop, steps, stop == steps or self._evaluates(number)))

    def longest_first(self, presets: Iterable[str]) -> list[str]:
        """The presets in the order in which processes that share them are done soonest."""
        times = self.stages[0].times
        cost = lambda preset: times[preset].seconds_per_token if preset in times else 0.0
        return sorted(presets, key=cost, reverse=True)

    def _together(self, seconds: Iterable[float]) -> float:
        """Time of several pieces of work, given to the processes with the longest first."""
        busy = [0.0] * self.processes
        for piece in sorted(seconds, reverse=True):
            busy.sort()
            busy[0] += piece
        return max(busy)

    def _overhead(self, time: StageTime) -> float:
        """Seconds of a warm-up that are no training: building the model, the checkpoint."""
        tokens = WARMUP_STEPS * self.step_tokens
        return max(0.0, time.seconds - tokens * time.seconds_per_token)

    def _evaluates(self, number: int) -> bool:
        """Whether a stage evaluates, where evaluations are spread evenly and the last one does."""
        return number * self.evaluations // STAGES > (number - 1) * self.evaluations // STAGES

    def save(self, file: Path) -> None:
        """Write the plan."""
        write_text(file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> "Plan":
        """Read what ``save`` wrote.

        Raises:
            ValueError: If another version wrote it.
        """
        values = json.loads(file.read_text(encoding="utf-8"))
        try:
            stages = [
                Stage(
                    **{
                        **stage,
                        "times": {p: StageTime(**taken) for p, taken in stage["times"].items()},
                    }
                )
                for stage in values.pop("stages")
            ]
            return cls(**values, stages=stages)
        except (KeyError, TypeError) as error:
            must_be = "plan must be of this version (or use --fresh)"
            raise ValueError(f"{must_be}, got {file}") from error
