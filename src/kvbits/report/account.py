"""Where the page's numbers come from and how to use its plan: data, settings, commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbits.report import numbers
from kvbits.report.collect import Run
from kvbits.report.tables import Table

CHECKSUM_DIGITS = 12


def model_name(run: Run) -> str:
    """Return the model's id as the study or the plan recorded it."""
    for source in (run.study, run.study.get("settings", {}), run.plan, run.plan.get("model", {})):
        for key in ("model_id", "model"):
            if isinstance(source, Mapping) and isinstance(source.get(key), str):
                return str(source[key])
    return run.path.name


def measured_on(run: Run) -> Table:
    """Each data set the verification read, once, with how often it was used."""
    uses: dict[tuple[str, ...], list[float]] = {}
    for record in run.records:
        key = tuple(_text(record.get(field)) for field in _DATA_FIELDS)
        uses.setdefault(key, []).append(float(record.get("seconds") or 0.0))
    used = [i for i in range(len(_DATA_FIELDS)) if any(key[i] for key in uses)]
    names = (_DATA_FIELDS[i].removeprefix("num_") for i in used)
    header = (*names, "measurements", "seconds")
    rows = tuple(
        (*(key[i] for i in used), numbers.count(len(seconds)), f"{sum(seconds):.0f}")
        for key, seconds in uses.items()
    )
    return Table(header, rows)


_DATA_FIELDS = ("data", "domain", "kind", "split", "checksum", "seed", "n", "num_tokens")


def settings(run: Run) -> Table:
    """Everything the study recorded about itself, but for the layers of the model."""
    flat = _flatten(run.study)
    return Table((), tuple((name, value) for name, value in flat if value))


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += _flatten(item, f"{prefix}{key} ")
        elif key != "layers":
            rows.append((f"{prefix}{key}".replace("_", " "), _text(item)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    text = str(value)
    is_checksum = len(text) >= 40 and all(char in "0123456789abcdef" for char in text)
    return text[:CHECKSUM_DIGITS] if is_checksum else text


def python_snippet(run: Run) -> str:
    """Return the lines that run the chosen plan in Python."""
    return (
        "from kvbits import CachePlan\n\n"
        f'plan = CachePlan.load("{run.path / "plan.json"}")\n'
        "model.generate(**inputs, past_key_values=plan.new_cache(model))"
    )


def command_snippet(run: Run, model: str | None = None) -> str:
    """Return the command that generates text with the chosen plan.

    Args:
        run: the run.
        model: what to call the model; the name the run recorded has no folder in it.
    """
    plan = run.path / "plan.json"
    return f'kvbits generate {model or model_name(run)} --plan {plan} --prompt "Once upon a time"'
