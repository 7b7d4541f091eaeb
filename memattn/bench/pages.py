"""Pages from the records of ``memattn bench --all``: one overview, and one page per machine."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memattn.bench import report
from memattn.files import write_text

Records = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by machine and operator

HEAD = """# Benchmarks of the operators

Written by `memattn bench --all` from the records in `machines/`. Running the command on another
machine adds a column. Times are medians, with the 20 and 80 % quantiles in brackets. A speed-up is
the peer's time over ours, round by round in one run. A star marks a share of the roof measured
while the machine was disturbed.
"""


def write(records: Records, folder: Path) -> list[Path]:
    """Write all pages; returns their paths."""
    records = dict(sorted(records.items()))
    texts = {"bench.md": overview(records)}
    texts |= {f"bench-{name}.md": page(name, own) for name, own in records.items()}
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def overview(records: Records) -> str:
    """The page that compares all machines."""
    parts = [HEAD, *_machines(records)]
    operators = dict.fromkeys(name for own in records.values() for name in own)
    for operator in sorted(operators):
        own = {machine: found[operator] for machine, found in records.items() if operator in found}
        parts += [f"## {operator}\n", *_bars(own), *_times(own)]
    return "\n".join(parts)


def page(machine: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows of one machine."""
    parts = [f"# {_device(next(iter(records.values())))}\n"]
    parts.append("Written by `memattn bench --all`; [all machines](bench.md).\n")
    for operator, record in sorted(records.items()):
        timed = [row for row in record["rows"] if row["seconds"] is not None]
        parts += [f"## {operator}\n", f"{_of(record)}.\n"]
        parts += _table(report.COLUMNS, [report.row_cells(row) for row in timed])
        told = [line for line in [report.disturbed_line(timed)] if line is not None]
        told += [report.roof_line(roof) for roof in record["roofs"]]
        reasons = dict.fromkeys(
            f"{row['competitor']}: {row['reason']}" for row in record["rows"] if row["reason"]
        )
        parts += [f"- {line.removeprefix('* ')}" for line in [*told, *reasons]]
        if any(sweep["seconds"] or sweep["peak_bytes"] for sweep in record["sweeps"]):
            parts += ["", f"![Over T](machines/{machine}/{operator}.png)"]
        parts.append("")
    return "\n".join(parts)


def _device(record: Mapping[str, Any]) -> str:
    """The device of a record."""
    machine = record["machine"]
    cpu = machine["cpu"]
    if machine["gpu"] and record["suite"].startswith("gpu"):
        return machine["gpu"]
    return f"{cpu['name']}, {cpu['capability']}, {cpu['threads']} threads"


def _of(record: Mapping[str, Any]) -> str:
    """Date, versions and commit of a record."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = f"; commit {machine['commit']}" if machine["commit"] else ""
    return f"{machine['date']}; {versions}{commit}"


def _machines(records: Records) -> Iterator[str]:
    yield "## Machines\n"
    rows = []
    for name, own in records.items():
        groups: dict[str, list[str]] = {}
        for operator, record in sorted(own.items()):
            groups.setdefault(_of(record).split("; ", 1)[1], []).append(operator)
        dates = sorted(record["machine"]["date"] for record in own.values())
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        told = "; ".join(
            f"{what}: {', '.join(who)}" if len(groups) > 1 else what for what, who in groups.items()
        )
        first = next(iter(own.values()))
        rows.append([f"[{name}](bench-{name}.md)", _device(first), span, told])
    yield from _table(("machine", "device", "measured", "versions and commit"), rows)


def _bars(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What each bar requires, and what each machine reached."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    limits: dict[str, list[str]] = {}
    for machine, record in records.items():
        for bar in record["bars"]:
            if bar["met"] is False and bar.get("limited_by"):
                limits.setdefault(bar["limited_by"], []).append(bar["bar"])
            required = f"{'<=' if bar['at_most'] else '>='} {bar['target']:.3g} {bar['unit']}"
            if bar["must"] is not None:
                required += f" (at least {bar['must']:g})"
            if bar["reached"] is None:
                cell = bar["reason"]
            else:
                verdict = "met" if bar["met"] else "least met" if bar["met_must"] else "**missed**"
                cell = f"{bar['reached']:.3g} {verdict}"
            found.setdefault((bar["bar"], required), {})[machine] = cell
    rows = [
        [*key, *(cells.get(machine, "") for machine in records)] for key, cells in found.items()
    ]
    yield from _table(("bar", "required", *records), rows)
    for limit, missed in limits.items():
        yield f"Missed ({'; '.join(dict.fromkeys(missed))}): {limit}\n"


def _times(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Times of all competitors on each machine."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for machine, record in records.items():
        for row in record["rows"]:
            seconds, speedup = row["seconds"], row.get("memattn_speedup")
            if seconds is None:
                continue
            cell = f"{1e3 * seconds['median']:.3g} ms"
            cell += f" ({1e3 * seconds['q20']:.3g}-{1e3 * seconds['q80']:.3g})"
            roof = report.row_cells(row)[report.COLUMNS.index("roof")]
            cell += f", {speedup['median']:.2f}x" if speedup else f", {roof} of the roof"
            key = row["label"], row["direction"], row["competitor"]
            found.setdefault(key, {})[machine] = cell
    rows = [
        [*key, *(cells.get(machine, "") for machine in records)] for key, cells in found.items()
    ]
    if rows:
        yield from _table(("case", "direction", "who", *records), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        cells = [*row, *[""] * (len(columns) - len(row))]
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
    yield ""
