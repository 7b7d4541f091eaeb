"""Train a DTG-MA model on tasks that come one after the other."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import check_bool, check_device, check_int, check_loss, check_seed, must
from memattn.data.stream_sources import read_tensors, tensor_stream
from memattn.data.streams import Scenario, Stream, Task
from memattn.dtgma.columns import TaskName
from memattn.dtgma.metrics import continual_metrics
from memattn.dtgma.model import DTGMAModel

READS = ("none", "previous", "all")
_EVAL_ROWS = 1024


class _NamedTask(NamedTuple):
    name: TaskName  # in the model
    num_classes: int
    data: Task


def train_continual(
    model: DTGMAModel,
    tasks: Mapping[TaskName, Sequence[Tensor]] | Sequence[Any] | Stream,
    epochs: int = 100,
    batch_size: int = 64,
    lr: float = 1e-3,
    device: torch.device | str | None = None,
    verbose: bool = False,
    freeze_after_training: bool = True,
    *,
    reads: str = "none",
    input_noise: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Learn tasks in order, each with Adam over its own parameters, and test on all so far.

    A task that the model does not have yet is registered before it is trained. Within each task the
    learning rate falls to 0 along a half cosine. After training, the class means of the task's
    training data are stored as its prototypes.

    Args:
        model: The model; trained in place, and left in evaluation mode.
        tasks: One of

            - ``(train_x, train_y, test_x, test_y)`` by name, with labels from 0 of the task's own
              classes, of which there are the model's ``num_classes``;
            - a sequence that ``tensor_stream`` takes, of four tensors for each task or of pairs
              such as Avalanche's experiences. Tasks are called 0, 1 and so on, and have the classes
              that occur in their training data, whatever their labels are;
            - a ``Stream``. If its scenario is not ``"task"``, the model infers the task of each
              test sample, and needs an ``inference``.

        epochs: Passes over the training data of each task.
        batch_size: Samples of a step.
        lr: Learning rate to begin with.
        device: Where to train; the model moves there. None means where it is.
        verbose: Whether to show progress.
        freeze_after_training: Whether to freeze each task once it is trained.
        reads: Which columns a new task reads: ``"none"``, ``"previous"`` (the task before it) or
            ``"all"``. Frozen tasks of earlier calls count too. It has no effect on tasks that are
            registered already.
        input_noise: Standard deviation of the Gaussian noise that is added to inputs in training.
        seed: Seed of new columns, of the order of samples, of noise and of dropout, below 2**40.

    Returns:
        The results of ``continual_metrics`` (``avg_accuracy``, ``avg_forgetting``,
        ``avg_forgetting_from_first``, ``backward_transfer``, ``forward_transfer``, ...), and

        - ``accuracy_matrix``: float64 ``[n, n]``, entry ``[i, j]`` on task ``j`` after training on
          task ``i``. Above the diagonal only ``[j - 1, j]`` is measured: task ``j`` registered, but
          not trained; the others are NaN.
        - ``task_accuracy``: the last row, by name.
        - ``untrained_accuracy``: float64 ``[n]``, of the model before any training, with the same
          initial columns. If no task reads another, it equals the entries above the diagonal.
        - ``parameters``: parameters at the end, all tasks included.
        - ``parameter_report``: the same by part, a ``ParameterReport``.
        - ``time``: seconds, tests included.

        Where tasks are inferred, ``untrained_accuracy`` and ``forward_transfer`` are missing.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If there is no task, a task is frozen already, its data or labels do not fit, or
            an option is out of range.
        FloatingPointError: If the loss of a task is not finite. Earlier tasks do not change; the
            task itself is registered and not frozen, and its parameters must not be used.
        RuntimeError: If it is called under ``torch.inference_mode``.
    """
    _check_mode()
    named = _named_tasks(model, tasks)
    _check_options(epochs, batch_size, lr, reads, input_noise)
    check_seed("seed", seed)
    check_bool("verbose", verbose)
    check_bool("freeze_after_training", freeze_after_training)
    if reads != "none" and not freeze_after_training:
        must("freeze_after_training", f"be True with reads={reads!r}", False)
    scenario = tasks.scenario if isinstance(tasks, Stream) else "task"
    if scenario != "task" and model.inference is None:
        must("model", "have an inference, for tasks that are not told", "inference=None")
    if device is not None:
        check_device("device", device)
        model.to(device)

    started = time.perf_counter()
    n = len(named)
    accuracy = torch.full((n, n), torch.nan, dtype=torch.float64)
    untrained = _untrained_accuracy(model, named, reads, seed) if scenario == "task" else None
    names = [task.name for task in named]
    with _progress(verbose, n * epochs) as report:
        for i, task in enumerate(named):
            _register(model, named, i, reads, seed)
            if untrained is not None and i:
                accuracy[i - 1, i] = evaluate_task(model, task.name, task.data)
            loss = train_task(
                *(model, task.name, task.data.train_x, task.data.train_y),
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                input_noise=input_noise,
                seed=_derive(seed, i),
                on_epoch=report,
            )
            if freeze_after_training:
                model.freeze_task(task.name)
            for j in range(i + 1):
                accuracy[i, j] = evaluate_task(model, named[j].name, named[j].data, scenario)
            report(
                f"task {task.name!r}: loss {loss:.4f}, accuracy {100 * accuracy[i, i]:.1f} %, "
                f"mean so far {100 * accuracy[i, : i + 1].mean():.1f} %"
            )
    results: dict[str, Any] = dict(continual_metrics(accuracy, untrained))
    counted = model.parameter_report()
    return results | dict(
        accuracy_matrix=accuracy,
        task_accuracy=dict(zip(names, accuracy[-1].tolist(), strict=True)),
        **({} if untrained is None else dict(untrained_accuracy=untrained)),
        parameters=counted.total,
        parameter_report=counted,
        time=time.perf_counter() - started,
    )


@torch.enable_grad()
def train_task(
    model: DTGMAModel,
    task: TaskName,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    input_noise: float = 0.0,
    on_epoch: Callable[[], None] = lambda: None,
) -> float:
    """Train one registered task, gather its prototypes, and return the mean loss of the last epoch.

    Args:
        model: The model, left in evaluation mode.
        task: A registered task that is not frozen.
        x: Training inputs, ``[n, ...]``.
        y: Their labels, int64 ``[n]``.
        epochs: Passes over the data.
        batch_size: Samples of a step.
        lr: Learning rate of Adam to begin with; it falls to 0 along a half cosine.
        seed: Seed of the order of samples, of noise and of dropout.
        input_noise: Standard deviation of the Gaussian noise that is added to inputs.
        on_epoch: Called after each pass.

    Raises:
        ValueError: If the task is unknown or frozen.
        FloatingPointError: If the loss is not finite at the end of an epoch, or after the last
            step. Parameters of the task must not be used then.
        RuntimeError: If it is called under ``torch.inference_mode``.
    """
    _check_mode()
    parameters = model.trainable_parameters(task)
    # fused: one pass over the many small parameters
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    steps = epochs * math.ceil(len(x) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = _on_device_of(model, x, y)
    mean, loss_sum = math.nan, torch.zeros((), device=x.device)
    model.train()
    with _seeded(seed, x.device):
        for epoch in range(epochs):
            loss_sum.zero_()
            for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
                inputs = x[rows]
                if input_noise:
                    inputs = inputs + input_noise * torch.randn_like(inputs)
                loss = F.cross_entropy(model(inputs, task), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.detach() * len(rows)
            mean = loss_sum.item() / len(x)
            check_loss(f"loss of task {task!r}", mean, epoch, lr)
            on_epoch()
    model.eval()
    with torch.no_grad():  # the loss after the last step is not in any epoch's mean
        last = F.cross_entropy(model(x[:batch_size], task), y[:batch_size]).item()
    check_loss(f"loss of task {task!r}", last, epochs - 1, lr)
    model.gather_prototypes(task, x, y)
    return mean


@torch.no_grad()
def evaluate_task(
    model: DTGMAModel, task: TaskName, data: Task, scenario: Scenario = "task"
) -> float:
    """Accuracy on a task's test data, in evaluation mode.

    Args:
        model: The model, left in evaluation mode.
        task: The task's name in the model.
        data: Its data.
        scenario: ``"task"``: the model is told the task. ``"domain"``: it infers a task, and its
            label must be right. ``"class"``: it infers a task, and both must be right.
    """
    model.eval()
    x, y = _on_device_of(model, data.test_x, data.test_y)
    right = 0
    for inputs, labels in zip(x.split(_EVAL_ROWS), y.split(_EVAL_ROWS), strict=True):
        names = [task] * len(labels) if scenario == "task" else model.infer_task(inputs)
        hits = model(inputs, names).argmax(-1) == labels
        if scenario == "class":
            hits &= torch.tensor([name == task for name in names], device=hits.device)
        right += int(hits.sum())
    return right / len(y)


def _named_tasks(model: DTGMAModel, tasks: Any) -> list[_NamedTask]:
    """Tasks in order, with their data checked."""
    if isinstance(tasks, Stream):
        named = [_NamedTask(task.name, len(task.classes), task) for task in tasks.tasks]
    elif isinstance(tasks, Mapping):
        named = []
        for key, data in tasks.items():
            name = int(key) if isinstance(key, Integral) and not isinstance(key, bool) else key
            known = name in model.tasks
            num_classes = model.num_classes_of(name) if known else model.num_classes
            classes = tuple(map(str, range(num_classes)))
            checked = Task(str(name), *read_tensors(f"tasks[{name!r}]", data), classes)
            named.append(_NamedTask(name, num_classes, checked))
    elif isinstance(tasks, Sequence) and not isinstance(tasks, str):
        stream = tensor_stream(tasks)
        named = [_NamedTask(i, len(task.classes), task) for i, task in enumerate(stream.tasks)]
    else:
        must("tasks", "be a dict, a list or a Stream", type(tasks).__name__, TypeError)
    if not named:
        must("tasks", "have at least one task", "none")
    for name, num_classes, _ in named:
        if name not in model.tasks:
            continue
        if model.is_frozen(name):
            must("tasks", "not have a task that is frozen", repr(name))
        if model.num_classes_of(name) != num_classes:
            wanted = f"have the {model.num_classes_of(name)} classes of the model's task {name!r}"
            must("tasks", wanted, num_classes)
    return named


def _check_mode() -> None:
    if torch.is_inference_mode_enabled():
        must("training", "be outside of torch.inference_mode", "a call inside", RuntimeError)


def _check_options(epochs: int, batch_size: int, lr: float, reads: str, input_noise: float) -> None:
    check_int("epochs", epochs, 1)
    check_int("batch_size", batch_size, 1)
    if not 0.0 < lr < math.inf:
        must("lr", "be positive and finite", lr)
    if not 0.0 <= input_noise < math.inf:
        must("input_noise", "be finite and at least 0", input_noise)
    if reads not in READS:
        must("reads", f"be one of {', '.join(READS)}", repr(reads))


def _register(model: DTGMAModel, named: list[_NamedTask], i: int, reads: str, seed: int) -> None:
    """Register a task that the model lacks; its column depends on the seed and ``i`` alone."""
    name, num_classes, _ = named[i]
    if name in model.tasks:
        return
    earlier = [task for task in model.tasks if model.is_frozen(task)]
    read = {"none": [], "previous": earlier[-1:], "all": earlier}[reads]
    with _seeded(_derive(seed, i), torch.device("cpu")):
        model.register_task(name, num_classes, reads=read)


def _untrained_accuracy(
    model: DTGMAModel, named: list[_NamedTask], reads: str, seed: int
) -> Tensor:
    """Accuracy on each task of a model in which nothing is trained, ``[n]``."""
    fresh = copy.deepcopy(model)
    accuracy = []
    for i, task in enumerate(named):
        _register(fresh, named, i, reads, seed)
        fresh.freeze_task(task.name)
        accuracy.append(evaluate_task(fresh, task.name, task.data))
    return torch.tensor(accuracy, dtype=torch.float64)


def _on_device_of(model: DTGMAModel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    weight = model.tokens.projection.weight
    return x.to(weight.device, weight.dtype), y.to(weight.device)


def _derive(seed: int, i: int) -> int:
    """A seed of its own for each task, without collisions between neighbouring seeds."""
    return seed * 1_000_003 + i


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for a while; afterwards they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _progress(verbose: bool, total: int) -> Iterator[Callable[..., None]]:
    """Yield a function to call after each epoch, or with a line to print."""
    if not verbose:
        yield lambda line=None: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        bar = progress.add_task("train_continual", total=total)

        def report(line: str | None = None) -> None:
            if line is None:
                progress.advance(bar)
            else:
                progress.console.print(line, highlight=False)

        yield report
