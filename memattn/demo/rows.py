"""Rows of the demo's comparison, as text for the terminal and for the page."""

from typing import Any


def columns(report: dict[str, Any]) -> tuple[str, ...]:
    """Heads of the comparison; the last one is a verdict."""
    n = max(tokens for result in report["results"] for tokens, _ in result["state_bytes"])
    return (
        *("preset", "bits per byte", "tokens/s", f"state after {n:,} tokens", "parameters"),
        "audit",
    )


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the comparison, as text."""
    return [
        (
            result["preset"] + (f", from {result['start']}" if result["start"] else ""),
            f"{result['bits_per_byte']:.3f}",
            f"{result['tokens_per_second']:,.0f}",
            format_bytes(result["state_bytes"][-1][1]),
            f"{result['parameters'] / 1e6:.2f} M",
            result["audit"]["verdict"],
        )
        for result in report["results"]
    ]


def yardstick_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of what is counted and not learned, as text."""
    return [
        (
            f"{found['name']}, vocabulary of {found['vocab_size']:,}",
            f"{found['bits_per_byte']:.3f}",
            *[""] * (len(columns(report)) - 2),
        )
        for found in report["yardsticks"]
    ]


def format_bytes(size: float) -> str:
    """A size in KiB or MiB."""
    return f"{size / 2**20:,.2f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"
