"""Output of a benchmark run: JSON records, printed tables, plots over T."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from memattn.bench.engine import Measurement, roof_key
from memattn.bench.roof_samples import DISTURBED, RATES, RoofSamples
from memattn.bench.roofline import Roofs, work_of
from memattn.bench.timing import Timing
from memattn.files import replacing_file, write_text

COLUMNS = ("case", "direction", "competitor", "median", "20-80 %", "tokens/s", "useful", "roof")
COLUMNS = (*COLUMNS, "GB/s", "speed-up", "peak memory")


def machine(seed: int) -> dict[str, Any]:
    """Date, device, versions and commit of a run."""
    cuda = torch.cuda.is_available()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if cuda:
        import triton

        versions |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "versions": versions,
        "commit": _commit(),
        "seed": seed,
    }


def timing_record(timing: Timing) -> dict[str, float]:
    """Median and spread of a timing, for JSON."""
    return {
        "median": timing.median,
        "min": timing.fastest,
        "q20": timing.q20,
        "q80": timing.q80,
        "samples": len(timing.samples),
    }


def row_records(rows: Sequence[Measurement], roof_samples: RoofSamples) -> list[dict[str, Any]]:
    """Measurements for JSON, with shares of the best roofs sampled so far."""
    best = roof_samples.best()
    records = []
    for row in rows:
        key = roof_key(row.case)
        record = row_record(row, best.get(key))
        if row.timing is not None and row.roof_sample is not None:
            work = work_of(row.case.work(), row.direction)
            record["machine_share"] = roof_samples.share_of_best(key, row.roof_sample, work)
        records.append(record)
    return records


def row_record(row: Measurement, roofs: Roofs | None) -> dict[str, Any]:
    """One measurement for JSON: seconds, useful rates, share of the roof, peak memory."""
    case = row.case
    record: dict[str, Any] = {
        "operator": case.operator,
        "case": case.kind,
        "label": case.label(),
        "T": case.T,
        "tokens": case.tokens(),
        "sizes": case.sizes(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": case.device,
        "direction": row.direction,
        "competitor": row.competitor,
        "reason": row.reason,
        "seconds": None,
        "peak_bytes": row.peak_bytes,
    }
    if row.timing is not None:
        work = work_of(case.work(), row.direction)
        seconds = row.timing.median
        record |= {
            "seconds": timing_record(row.timing),
            "memattn_speedup": None if row.speedup is None else timing_record(row.speedup),
            "useful_flops": work.flops,
            "flops_per_second": work.flops / seconds,
            "bytes_per_second": work.bytes / seconds,
        }
        if roofs is not None:
            record |= {
                "roof_share": roofs.seconds(work) / seconds,
                "roof_share_without_overlap": roofs.seconds_without_overlap(work) / seconds,
            }
    return record


def row_cells(record: Mapping[str, Any]) -> list[str]:
    """The cells of one record in the table."""
    cells = [record["label"], record["direction"], record["competitor"]]
    seconds = record["seconds"]
    if seconds is None:
        return [*cells, str(record["reason"])]
    flops = record["flops_per_second"]
    speedup, peak = record["memattn_speedup"], record["peak_bytes"]
    roof = record.get("roof_share")
    return [
        *cells,
        f"{1e3 * seconds['median']:.3g} ms",
        f"{1e3 * seconds['q20']:.3g}-{1e3 * seconds['q80']:.3g}",
        f"{record['tokens'] / seconds['median']:,.0f}",
        f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s",
        "" if roof is None else f"{100 * roof:.0f} %{'*' if is_disturbed(record) else ''}",
        f"{record['bytes_per_second'] / 1e9:.3g}",
        "" if speedup is None else f"{speedup['median']:.2f}x",
        "" if peak is None else f"{peak / 2**20:.1f} MiB",
    ]


def is_disturbed(record: Mapping[str, Any]) -> bool:
    """Whether the machine was slow around a measurement; see ``memattn.bench.roof_samples``."""
    return record.get("machine_share", 1.0) < DISTURBED


def disturbed_line(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The explanation of the star beside a share of the roof; None without a star."""
    shares = [record["machine_share"] for record in records if is_disturbed(record)]
    if not shares:
        return None
    return (
        f"* disturbed: around {len(shares)} of {len(records)} rows the machine ran below "
        f"{100 * DISTURBED:.0f} % of its best rate; the lowest was {100 * min(shares):.0f} %"
    )


def roof_line(roof: Mapping[str, Any]) -> str:
    """The roofs of a device, and the slowest sample as a percentage of the best."""
    units = {
        "matmul_flops": ("product", 1e9, ".4g", "GFLOP/s"),
        "exps": ("exp", 1e9, ".3g", "G/s"),
        "copy_bytes": ("copy", 1e9, ".3g", "GB/s"),
    }
    told = []
    for rate in RATES:
        name, scale, form, unit = units[rate]
        slowest = min(sample[rate] for sample in roof["samples"]) / roof[rate]
        told.append(f"{name} {roof[rate] / scale:{form}} {unit} ({100 * slowest:.0f} %)")
    return (
        f"roofs on {roof['device']}, {roof['dtype']}, the best of {len(roof['samples'])} samples "
        f"taken between the cases (the slowest in brackets): {', '.join(told)}"
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: with rich if it is installed, else in plain columns."""
    rows = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        lines = [columns, ["-" * width for width in widths], *rows]
        text = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        sys.stdout.write(f"\n{title}\n{text}\n")
        return
    grid = Table(title=title, title_justify="left", box=None, header_style="bold")
    for name in columns:
        grid.add_column(name, no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    # rich would cut cells, and so numbers, to the width of a narrow terminal or a pipe
    console = Console()
    console.width = max(console.width, 160)
    console.print(grid, crop=False)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_rows(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of timed rows, then each competitor that was not timed and why."""
    timed = [record for record in records if record["seconds"] is not None]
    if timed:
        table(title, COLUMNS, [row_cells(record) for record in timed])
        disturbed = disturbed_line(timed)
        if disturbed is not None:
            say(disturbed)
    missing: dict[str, list[str]] = {}
    for record in records:
        if record["seconds"] is None:
            line = f"{record['competitor']} on {record['device']}: {record['reason']}"
            missing.setdefault(line, []).append(f"{record['label']}, {record['direction']}")
    for line, rows in missing.items():
        say(f"{line} ({rows[0] if len(rows) == 1 else f'{len(rows)} rows'})")


def print_machine(record: Mapping[str, Any]) -> None:
    """Print roofs, devices and versions."""
    for roof in record["roofs"]:
        say(roof_line(roof))
    machine = record["machine"]
    cpu, versions = machine["cpu"], machine["versions"]
    commit = [f"commit {machine['commit']}"] if machine["commit"] else []
    say(
        f"{machine['date']}; {machine['gpu'] or 'no GPU'}; "
        f"{cpu['name']}, {cpu['threads']} threads, {cpu['capability']}; "
        + ", ".join([f"{k} {v}" for k, v in versions.items()] + commit)
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show progress on a terminal; yields a function that names the next step."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = iter(range(total + 1))
        yield lambda text: bar.update(task, description=text, completed=next(begun, total))


def save_json(record: Mapping[str, Any], path: Path) -> None:
    """Write the record atomically."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def plot(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw time per token and peak memory over T, one line for each competitor.

    Args:
        records: Rows of one case, several T and directions.
        path: The PNG file to write.
        title: Text over the figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    timed = [record for record in records if record["seconds"] is not None]
    directions = list(dict.fromkeys(record["direction"] for record in timed))
    names = list(dict.fromkeys(record["competitor"] for record in timed))
    panels: list[tuple[str, str, list[Any]]] = [
        (f"{direction}: µs per token", direction, timed) for direction in directions
    ]
    panels += [
        (f"{direction}: peak memory, MiB", direction, [r for r in timed if r["peak_bytes"]])
        for direction in directions
        if any(r["peak_bytes"] for r in timed if r["direction"] == direction)
    ]
    if not panels:
        return
    figure = Figure(figsize=(3.6 * len(panels), 3.6), layout="constrained")
    for number, (text, direction, rows) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for index, name in enumerate(names):
            own = [r for r in rows if (r["direction"], r["competitor"]) == (direction, name)]
            points = sorted(own, key=lambda r: r["T"])
            lengths = [r["T"] for r in points]
            style: dict[str, Any] = {"color": f"C{index}", "label": name, "marker": "o", "ms": 3}
            style["linewidth"] = 2.2 if name == names[0] else 1.1
            if "memory" in text:
                axes.plot(lengths, [r["peak_bytes"] / 2**20 for r in points], **style)
                continue
            middle, low, high = (
                [1e6 * r["seconds"][key] / r["tokens"] for r in points]
                for key in ("median", "q20", "q80")
            )
            axes.plot(lengths, middle, **style)
            axes.fill_between(lengths, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="T", title=text)
        ticks = sorted({r["T"] for r in rows})
        axes.set_xticks(ticks, [str(T) for T in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    _save(figure, path)


def plot_sweeps(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw time and peak memory per token over T, one line for each sweep of a suite.

    Args:
        records: Sweeps of a suite's record.
        path: The PNG file to write.
        title: Text over the figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    panels: list[tuple[str, str, Any]] = [
        ("µs per token", "seconds", lambda r: 1e6 * r["seconds"]["median"] / r["tokens"]),
        ("peak memory, bytes per token", "peak_bytes", lambda r: r["peak_bytes"] / r["tokens"]),
    ]
    for number, (text, field, value) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, number)
        lines: dict[str, list[Any]] = {}
        for record in records:
            if record[field] is not None:
                what = f"{record['operator']}: {record['label']}, {record['direction']}"
                lines.setdefault(what.replace(f" T={record['T']}", ""), []).append(record)
        for what, rows in lines.items():
            axes.plot([r["T"] for r in rows], [value(r) for r in rows], "o-", ms=3, label=what)
        lengths = sorted({record["T"] for rows in lines.values() for record in rows})
        axes.set(xscale="log", xlabel="T", title=text)
        axes.set_ylim(bottom=0)
        axes.set_xticks(lengths, [str(T) for T in lengths], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if lines:
            axes.legend(fontsize=7, loc="center left", frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a picture atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _commit() -> str | None:
    """The commit of the measured checkout, with a note if its code was changed since.

    None if the package is not in a checkout.
    """
    root = Path(__file__).parents[2]

    def git(*words: str) -> str | None:
        command = ("git", "-C", str(root), *words)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if not (root / ".git").exists():
        return None
    commit = git("rev-parse", "--short=10", "HEAD")
    changes = git("status", "--porcelain", "-uno", "--", "memattn", "kernels", "csrc")
    return f"{commit} and changes" if commit and changes else commit


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
