"""The page of the demo: one HTML file that needs no other, in a light and a dark dress."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from memattn.demo.continual import HEADS, continual_rows
from memattn.demo.ideas import IDEA_HEADS, idea_rows
from memattn.demo.rows import columns, format_bytes, table_rows, yardstick_rows
from memattn.files import write_text
from memattn.viz import draw_curves, draw_influence, draw_state, plot_curves, to_svg

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #60646c; --page: #fcfcfd; --card: #fff;
  --line: #e0e1e6; --good: #18794e; --bad: #cd2b31; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --dim: #b0b4ba; --page: #111113;
  --card: #18191b; --line: #363a3f; --good: #3dd68c; --bad: #ff9592; --accent: #70b8ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.02em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; } .lede { color: var(--dim); font-size: 1.1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1rem 1.25rem; margin: 1rem 0; overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
.pair .card { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .75rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
tr:last-child td { border-bottom: 0; } th { color: var(--dim); font-weight: 500;
  font-size: .85rem; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:first-child { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
svg { width: 100%; height: auto; display: block; color: var(--ink); }
svg text { font-family: inherit !important; }
figure { margin: 0; } figcaption, .note { color: var(--dim); font-size: .9rem; }
blockquote { margin: .5rem 0 0; padding-left: 1rem; border-left: 3px solid var(--accent);
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; }
details summary { cursor: pointer; }
"""


def write_page(out: Path, report: dict[str, Any], metrics: Mapping[str, list[dict]]) -> Path:
    """Write ``curves.png`` and ``index.html``.

    Args:
        out: Folder to write to.
        report: What ``results.json`` holds.
        metrics: Rows of ``metrics.csv`` by preset.

    Returns:
        Path of the page.
    """
    plot_curves(metrics, out / "curves.png", title=f"{report['tokens']:,} tokens each")
    results = report["results"]
    parts = [
        _header(report),
        "<h2>Result</h2>",
        f'<div class="card">{_table(report)}</div>',
        _reading(report),
        *_ideas(report),
        *_continual(report),
        "<h2>Learning</h2>",
        '<div class="pair">'
        + _card(_curves(metrics, "tokens"), "Over tokens: what each model makes of the same text.")
        + _card(_curves(metrics, "seconds"), "Over time on this machine, evaluations included.")
        + "</div>",
        "<h2>State</h2>",
        "<p>What one sequence carries from token to token while text is generated. A model that "
        "keeps every key grows with the text; one with segments or memory does not have to.</p>",
        _card(_state(results), "Measured: bytes of the cache after decoding that many tokens."),
        "<h2>Who reaches whom</h2>",
        "<p>One token is changed, and the logits at every position are compared with those "
        "before. Blank is exactly zero, to the last bit: nothing above the diagonal means that "
        "no token reaches into the past.</p>",
        '<div class="pair">'
        + "".join(_card(_influence(r), html.escape(r["preset"])) for r in results)
        + "</div>",
        '<p class="note">Colour: logarithm of the mean change of the logits, the same scale in '
        "every picture. Random tokens, trained weights.</p>",
        "<h2>Samples</h2>",
        *map(_sample, results),
        "<h2>Audit</h2>",
        *map(_audit, results),
        "<h2>How it was made</h2>",
        f'<div class="card">{_facts(report)}</div>',
    ]
    body = "\n".join(parts)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>memattn demo</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    path = out / "index.html"
    write_text(path, page)
    return path


def _header(report: dict[str, Any]) -> str:
    results = report["results"]
    names = ", ".join(result["preset"] for result in results if not result["start"])
    added = "".join(
        f" {result['preset']} begins with the weights of {result['start']}, which stay as they "
        f"are, and learns {result['tokens']:,} tokens more."
        for result in results
        if result["start"]
    )
    return (
        "<h1>The same text, the same budget</h1>"
        f'<p class="lede">{html.escape(names)}: each trained from nothing on '
        f"{report['tokens']:,} tokens of {html.escape(report['config']['corpus'])}, then "
        f"audited.{html.escape(added)} {html.escape(report['device'])}.</p>"
    )


def _table(report: dict[str, Any]) -> str:
    """The comparison of the language models, and what is counted beside them."""
    rows = [*table_rows(report), *yardstick_rows(report)]
    return _html_table(columns(report), rows, lambda verdict: verdict.startswith("all 0"))


def _html_table(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    is_good: Callable[[str], bool] | None = None,
) -> str:
    """Rows of text; with ``is_good`` the last cell of each is a verdict, or empty."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = []
    for cells in rows:
        kind = ""
        if is_good is not None and cells[-1]:
            kind = "good" if is_good(cells[-1]) else "bad"
        plain = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells[:-1])
        body.append(f'<tr>{plain}<td class="{kind}">{html.escape(cells[-1])}</td></tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _ideas(report: dict[str, Any]) -> list[str]:
    """One small task for each system, of the kind that its idea is for."""
    table = _html_table(IDEA_HEADS, idea_rows(report["ideas"]))
    return [
        "<h2>What each idea is for</h2>",
        "<p>One small task for each system, beside the same model without the idea.</p>",
        f'<div class="card">{table}</div>',
    ]


def _continual(report: dict[str, Any]) -> list[str]:
    """Tasks one after the other; nothing where they were not run."""
    results = report["continual"]
    if not results:
        return []
    table = _html_table(HEADS, continual_rows(results), lambda verdict: verdict == "unchanged")
    return [
        "<h2>Tasks one after the other</h2>",
        f"<p>Ten handwritten digits in {len(results[0]['accuracy'])} tasks. Each task is trained "
        "alone, and all are tested at the end. DTG-MA gives every task a column of its own and "
        "freezes the columns before it, so what was learned stays to the last bit, at the price "
        "of parameters that grow with the tasks. Fine-tuning trains one network on.</p>",
        f'<div class="card">{table}</div>',
    ]


def _reading(report: dict[str, Any]) -> str:
    epochs = report["tokens"] / report["train_tokens"]
    counted = min(report["tokens"], report["train_tokens"])
    processes = report["processes"]
    beside = f", of one of {processes} models that train at a time" if processes > 1 else ""
    return (
        "<p><b>How to read it.</b> Bits per byte of documents that no model was trained on: lower "
        "is better, and a smaller vocabulary wins nothing. The last rows are counted, not learned: "
        f"how often each token, and each pair of tokens, comes in {counted:,} of the "
        f"{report['train_tokens']:,} tokens to train on, no more than the models were trained on. "
        "A model that does not pass the pairs has learned hardly more than "
        "they say. Tokens per second is the training speed, the median of all "
        f"steps{beside}. The audit compares runs of each model in float64 and in its own dtype: "
        "&ldquo;all 0&rdquo; means that later tokens, other rows and padding change nothing, "
        "and that decoding token by token gives what one pass gives.</p>"
        f"<p><b>What it does not show.</b> One seed ({report['config']['seed']}), "
        f"{epochs:.1f} passes over a small text, models that a laptop trains in minutes: a "
        "difference in loss here is no claim that one kind of model is better. Texts of "
        f"{report['config']['seq_len']} tokens give a long context nothing to win.</p>"
    )


def _card(picture: str, caption: str) -> str:
    return f'<div class="card"><figure>{picture}<figcaption>{caption}</figcaption></figure></div>'


def _curves(metrics: Mapping[str, list[dict]], x: str) -> str:
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    draw_curves(figure.add_subplot(), metrics, x=x)
    return to_svg(figure)


def _state(results: list[dict[str, Any]]) -> str:
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    draw_state(figure.add_subplot(), {r["preset"]: r["state_bytes"] for r in results})
    return to_svg(figure)


def _influence(result: dict[str, Any]) -> str:
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    image = draw_influence(axes, **result["influence"])
    image.set_clim(-4.0, 0.0)
    figure.colorbar(image, ax=axes, shrink=0.85)
    return to_svg(figure)


def _sample(result: dict[str, Any]) -> str:
    return (
        f'<div class="card"><b>{html.escape(result["preset"])}</b>'
        f"<blockquote><b>{html.escape(result['prompt'])}</b>{html.escape(result['sample'])}"
        "</blockquote></div>"
    )


def _audit(result: dict[str, Any]) -> str:
    words = {True: '<span class="good">pass</span>', False: '<span class="bad">fail</span>'}
    names = ("check", "case", "dtype", "difference", "bound", "result")
    rows = []
    for row in result["audit"]["rows"]:
        numbers = ("" if x is None else f"{float(x):.1e}" if x else "0" for x in _numbers(row))
        cells = [*map(html.escape, (row["check"], row["case"], row["dtype"])), *numbers]
        cells.append(words.get(row["passed"], f"not applicable: {html.escape(row['where'])}"))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="card"><details><summary><b>{html.escape(result["preset"])}</b>: '
        f"{html.escape(result['audit']['verdict'])}</summary><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></details></div>"
    )


def _numbers(row: dict[str, Any]) -> tuple[Any, Any]:
    return row["value"], row["bound"]


def _facts(report: dict[str, Any]) -> str:
    config = report["config"]
    sizes = ", ".join(f"{name} {value}" for name, value in config["sizes"].items())
    facts = {
        "device": report["device"],
        "versions": ", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        "steps": f"{report['steps']:,} of {config['batch_size']} x {config['seq_len']} tokens",
        "corpus": f"{config['corpus']}, {report['train_tokens']:,} tokens to train on, "
        f"{report['held_out_tokens']:,} held out, no document on both sides",
        "sizes": sizes,
        "state": ", ".join(
            f"{r['preset']} {format_bytes(r['state_bytes'][-1][1])}" for r in report["results"]
        ),
        "time of training": ", ".join(
            f"{r['preset']} {r['seconds']:.0f} s" for r in report["results"]
        ),
        "again": f"memattn demo --minutes {config['minutes']:g} --seed {config['seed']} --fresh",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"
