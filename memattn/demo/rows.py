"""Rows of the demo's comparison, as text for the terminal and for the page."""

from typing import Any


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the comparison, as text."""
    return [
        (
            result["preset"] + (f", from {result['start']}" if result["start"] else ""),
            f"{result['held_out_loss']:.3f}",
            f"{result['tokens_per_second']:,.0f}",
            format_bytes(result["state_bytes"][-1][1]),
            f"{result['parameters'] / 1e6:.2f} M",
            result["audit"]["verdict"],
        )
        for result in report["results"]
    ]


def format_bytes(size: float) -> str:
    """A size in KiB or MiB."""
    return f"{size / 2**20:,.2f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"
