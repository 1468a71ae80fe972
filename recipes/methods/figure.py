"""Draw quality against effective bits, and print the table: from the records of ``measure.py``.

python recipes/methods/figure.py results.jsonl figure.png    (needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BITS = "effective_bits_at_context"
DOMAINS = ("text", "reasoning", "recall")


def pareto(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that no other beats in both bits and text KL, by bits."""
    front: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda r: (r[BITS], r["text"]["kl_nats"])):
        if not front or record["text"]["kl_nats"] < front[-1]["text"]["kl_nats"]:
            front.append(record)
    return front


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, by effective bits; members of the Pareto set are bold."""
    front = {record["subject"] for record in pareto(records)}
    context = records[0]["context"]
    rows = [
        f"| method | effective bits | at {context} tokens | text KL, nats | flips, % | perplexity "
        "| reasoning KL | recall KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda r: r[BITS]):
        text = record["text"]
        name = record["subject"]
        cells = [
            f"**{name}**" if name in front else name,
            f"{record['effective_bits']:.2f}",
            f"{record[BITS]:.2f}",
            f"{text['kl_nats']:.5f} ± {text['kl_se']:.5f}",
            f"{100 * text['flips']:.2f}",
            f"{text['perplexity']:.3f}",
            *(f"{record[name]['kl_nats']:.5f}" for name in DOMAINS[1:]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """One point a record, a colour a method, a line through the Pareto set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=110)
    methods = list(dict.fromkeys(record["method"] for record in records))
    for index, method in enumerate(methods):
        own = sorted((r for r in records if r["method"] == method), key=lambda r: r[BITS])
        bits, kl = [r[BITS] for r in own], [r["text"]["kl_nats"] for r in own]
        error = [1.96 * r["text"]["kl_se"] for r in own]
        look = {"marker": "osD^vP*X<>"[index % 10], "color": pyplot.cm.tab20(index % 20)}
        axes.errorbar(bits, kl, error, label=method, linestyle="none", capsize=2, **look)
    front = pareto(records)
    axes.plot(
        [r[BITS] for r in front],
        [r["text"]["kl_nats"] for r in front],
        color="grey",
        linewidth=1,
        label="Pareto set",
        zorder=0,
    )
    axes.set(
        yscale="log",
        xlabel=f"effective bits at {records[0]['context']} tokens, all included",
        ylabel="forward KL on text, nats",
        title="kvbits-tiny: quality against size",
    )
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    found = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    print(table(found))
    if len(sys.argv) > 2:
        draw(found, Path(sys.argv[2]))
