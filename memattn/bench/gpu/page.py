"""Make a page from the results of a session (``results.jsonl`` and ``session.json``).

``python -m memattn.bench.gpu.page FOLDER > docs/results/h100.md``
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memattn.bench.gpu import compare, host

HEAD = """# On an H100

One run of `make gpu` with GPU_SECONDS={seconds:g}. Each stage has a time limit and stops there.
{machine}.
"""


def page(folder: Path) -> str:
    """The page of the results in a folder.

    Raises:
        FileNotFoundError: If it holds no results.
    """
    lines = (folder / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    session = json.loads((folder / "session.json").read_text())
    pairs = [(record["job"], record["result"]) for record in records]
    parts = [HEAD.format(**session), *_checks(pairs), *_before(pairs)]
    parts += [*_host(pairs), *_predictions(pairs), *_bars(pairs)]
    return "\n".join([*parts, *_rows(pairs), *_trials(pairs)])


Pairs = Sequence[tuple[dict[str, Any], dict[str, Any]]]


def _checks(pairs: Pairs) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for job, result in pairs:
        if job["task"] == "correct":
            key = job["operator"], job["direction"], job["dtype"]
            groups.setdefault(key, []).append(result)
    if groups:
        yield "## Against float64\n"
        yield "Largest error over the error budget (at most 1 is right), over the cases that ran.\n"
        yield from _table(
            ("operator", "direction", "dtype", "cases", "right", "error / budget"),
            (
                [*key, str(len(own)), str(sum(r["status"] == "ok" for r in own)), _worst(own)]
                for key, own in groups.items()
            ),
        )
    tests: dict[str, int] = {}
    for job, result in pairs:
        if job["task"] == "test":
            tests[result["status"]] = tests.get(result["status"], 0) + 1
    if tests:
        told = ", ".join(f"{n} {status}" for status, n in sorted(tests.items()))
        yield f"CUDA tests that ran: {told}.\n"
    bad = [
        f"- {job.get('label') or job['operator']}: {result.get('reason', result['status'])}"
        for job, result in pairs
        if result["status"] in ("wrong", "error", "failed")
    ]
    if bad:
        yield "\n".join(["What failed:\n", *bad, ""])


def _worst(results: Sequence[Mapping[str, Any]]) -> str:
    return f"{max((r['worst'] for r in results if 'worst' in r), default=float('nan')):.2f}"


def _predictions(pairs: Pairs) -> Iterator[str]:
    rows = [row for _, result in pairs for row in result.get("predictions", ())]
    if rows:
        yield "## Predictions from the machine code\n"
        yield "TFLOP/s of all pairs in executed tiles (for a window: of allowed pairs).\n"
        yield from _table(
            ("what", "predicted", "measured"),
            (
                [
                    row["what"],
                    "" if row["predicted"] is None else "-".join(map(str, row["predicted"])),
                    str(row["measured"]),
                ]
                for row in rows
            ),
        )


def _host(pairs: Pairs) -> Iterator[str]:
    rows = host.table(pairs)
    if rows:
        yield "## Small calls\n"
        yield "Wall time of a call in a loop, with plain and with recorded launches, and the time\n"
        yield f"of the GPU alone. The goal is {host.AIM} us above the GPU alone.\n"
        yield from _table(host.COLUMNS, rows)


def _before(pairs: Pairs) -> Iterator[str]:
    rows = compare.ratios(list(pairs))
    if rows:
        yield "## Compared with the earlier build\n"
        yield "Both builds timed alternately, twice; T=8192, bfloat16, milliseconds.\n"
        yield from _table(
            ("case", "direction", "before", "now", "faster by"),
            (
                [
                    row["case"],
                    row["direction"],
                    ", ".join(f"{x:.3f}" for x in row["before"]),
                    ", ".join(f"{x:.3f}" for x in row["now"]),
                    f"{row['speedup']:.2f}x",
                ]
                for row in rows
            ),
        )


def _bars(pairs: Pairs) -> Iterator[str]:
    bars = {bar["bar"]: bar for _, result in pairs for bar in result.get("bars", ())}
    told = [bar for bar in bars.values() if bar["reached"] is not None]
    if told:
        yield "## Bars\n"
        yield from _table(
            ("bar", "required", "reached", ""),
            (
                [
                    bar["bar"],
                    f"{'<=' if bar['at_most'] else '>='} {bar['target']:.3g} {bar['unit']}"
                    + ("" if bar["must"] is None else f" (at least {bar['must']:g})"),
                    f"{bar['reached']:.3g}",
                    "met" if bar["met"] else "least met" if bar["met_must"] else "missed",
                ]
                for bar in told
            ),
        )


def _rows(pairs: Pairs) -> Iterator[str]:
    rows = [
        (row, row["seconds"])
        for _, result in pairs
        for row in result.get("rows", ())
        if row["seconds"] is not None
    ]
    if rows:
        yield "## Times\n"
        yield "Medians, and the 20 and 80 % quantiles. A speed-up is the peer's time over ours,\n"
        yield "round by round in one run.\n"
        yield from _table(
            ("case", "direction", "who", "ms", "20-80 %", "useful TFLOP/s", "ours is faster by"),
            (
                [
                    f"{row['operator']}: {row['label']}",
                    row["direction"],
                    row["competitor"],
                    f"{1e3 * seconds['median']:.3f}",
                    f"{1e3 * seconds['q20']:.3f}-{1e3 * seconds['q80']:.3f}",
                    f"{row['flops_per_second'] / 1e12:.0f}",
                    _factor(row["memattn_speedup"]),
                ]
                for row, seconds in rows
            ),
        )


def _factor(speedup: Mapping[str, float] | None) -> str:
    return "" if speedup is None else f"{speedup['median']:.2f}x"


def _trials(pairs: Pairs) -> Iterator[str]:
    trials = [
        [job["label"], f"{result['milliseconds']:.4f}"]
        for job, result in pairs
        if job["task"] == "tune-time" and result.get("milliseconds") is not None
    ]
    if trials:
        yield "## Other tile configurations\n"
        yield from _table(("candidate", "ms"), trials)


def _table(columns: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1])))
