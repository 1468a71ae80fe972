"""Draw quality against effective bits, and print the table: from the records of ``measure.py``.

pip install -r recipes/requirements.txt
python recipes/methods/figure.py results.jsonl [figure.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BITS = "effective_bits_at_context"
DOMAINS = ("text", "reasoning", "recall")
EXACT = "16 bits"  # full precision
MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a file, the lines of one plan joined; none if there is no file."""
    records: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        known = records.setdefault(record["subject"], {})
        accuracy = known.get("accuracy", {}) | record.get("accuracy", {})
        known.update(record, accuracy=accuracy)
    return list(records.values())


def title(record: dict[str, Any]) -> str:
    """Method, widths as ``K4V2``, and its other settings."""
    settings = dict(record.get("settings", {}))
    parts = [record["method"]]
    if {"key_bits", "value_bits"} <= settings.keys():
        parts.append(f"K{settings.pop('key_bits')}V{settings.pop('value_bits')}")
    return " ".join([*parts, *(f"{name}={value}" for name, value in settings.items())])


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
    tasks = accuracy_columns(records)
    columns = [
        *("method", "effective bits", f"at {context} tokens", "text KL, nats", "flips, %"),
        *("perplexity", "reasoning KL", "recall KL", *tasks.values()),
    ]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for record in sorted(records, key=lambda r: r[BITS]):
        text = record["text"]
        name = title(record)
        cells = [
            f"**{name}**" if record["subject"] in front else name,
            f"{record['effective_bits']:.2f}",
            f"{record[BITS]:.2f}",
            f"{text['kl_nats']:.5f} ± {text['kl_se']:.5f}",
            f"{100 * text['flips']:.2f}",
            f"{text['perplexity']:.3f}",
            *(f"{record[domain]['kl_nats']:.5f}" for domain in DOMAINS[1:]),
            *(accuracy(record, task) for task in tasks),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def accuracy_columns(records: list[dict[str, Any]]) -> dict[str, str]:
    """Title of the column of every task that was measured, with the number of problems.

    Raises:
        ValueError: If records are of different numbers of problems.
    """
    counts: dict[str, set[int]] = {}
    for record in records:
        for task, found in record.get("accuracy", {}).items():
            counts.setdefault(task, set()).add(found["n"])
    for task, numbers in counts.items():
        if len(numbers) > 1:
            raise ValueError(f"n of {task} must be the same in all records, got {numbers}")
    return {task: f"{task}, % (n = {min(numbers)})" for task, numbers in counts.items()}


def accuracy(record: dict[str, Any], task: str) -> str:
    """One cell: percent and standard error."""
    found = record.get("accuracy", {}).get(task)
    if found is None:
        return ""
    return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f}"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """One point a record, a colour a method; a line and rings mark the Pareto set."""
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
    bits, kl = [r[BITS] for r in front], [r["text"]["kl_nats"] for r in front]
    rings = {"marker": "o", "markersize": 13, "markerfacecolor": "none"}
    axes.plot(bits, kl, color="grey", linewidth=1, label="Pareto set", zorder=0, **rings)
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


def put(made: str, readme: Path) -> None:
    """Write a table between the marks of a Markdown file."""
    before, _, rest = readme.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise SystemExit(f"{readme} must hold {' and '.join(MARKS)}".replace("\n", ""))
    readme.write_text(f"{before}{MARKS[0]}{made}\n{MARKS[1]}{after}")


def main(records: Path, image: Path | None = None, readme: Path | None = None) -> None:
    found = [each for each in read_records(records) if "text" in each]
    print(table(found))
    if image:
        draw([each for each in found if each["method"] != EXACT], image)
    if readme:
        put(table(found), readme)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
