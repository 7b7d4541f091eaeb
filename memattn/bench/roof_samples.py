"""The machine's roofs, sampled between the cases of a run; each rate counts at its best sample.

A single measurement would depend on what else the machine does at that moment: another process
lowers the measured roof and so raises every share of it. Here a short sample is taken before the
first case and after each case. The best sample is the roof, and the two samples around a case show
whether the machine was disturbed while the case was timed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from memattn.bench.roofline import Roofs, Work, measure_roofs

DISTURBED = 0.85  # of the best rate; below it the machine was doing something else as well
RATES = ("matmul_flops", "exps", "copy_bytes")
RoofKey = tuple[str, torch.dtype]


@dataclass
class RoofSamples:
    """Samples of the machine's rates, by device and dtype.

    Attributes:
        seconds: Approximate time for each rate of one sample.
        measure: Takes one sample; called like ``memattn.bench.roofline.measure_roofs``.
        samples: The samples in the order they were taken.
    """

    seconds: float
    measure: Callable[..., Roofs] = measure_roofs
    samples: dict[RoofKey, list[Roofs]] = field(default_factory=dict)

    def sample_once(self, key: RoofKey) -> None:
        """Take a sample for this device and dtype unless there is one."""
        if key not in self.samples:
            self.sample(key)

    def sample(self, key: RoofKey) -> int:
        """Take a sample for this device and dtype; returns its index."""
        samples = self.samples.setdefault(key, [])
        samples.append(self.measure(*key, seconds=self.seconds))
        return len(samples) - 1

    def best(self) -> dict[RoofKey, Roofs]:
        """The roofs: each rate from its best sample."""
        return {
            key: Roofs(*(max(getattr(sample, rate) for sample in samples) for rate in RATES))
            for key, samples in self.samples.items()
        }

    def share_of_best(self, key: RoofKey, index: int, work: Work) -> float:
        """The rate that limits ``work`` in samples ``index - 1`` and ``index``, over its best."""
        best = self.best()[key]
        rate = best.limiting_rate(work)
        around = self.samples[key][max(index - 1, 0) : index + 1]
        return min(getattr(roofs, rate) for roofs in around) / getattr(best, rate)

    def records(self) -> list[dict[str, Any]]:
        """The roofs and all samples, for JSON."""
        return [
            {
                "device": key[0],
                "dtype": str(key[1]).removeprefix("torch."),
                **asdict(best),
                "samples": [asdict(sample) for sample in self.samples[key]],
            }
            for key, best in self.best().items()
        ]
