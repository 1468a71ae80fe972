"""Where the page's numbers come from and how to use its plan: data, settings, commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def command(run: Run) -> str:
    """Return the command that made the run, as it was typed; empty where Python made it."""
    return str(run.study.get("command") or "")


def checksums(run: Run) -> Table:
    """What pins the run down: versions, model, weights and the plan file."""
    model = run.study.get("model", {})
    known = (
        ("model", model_name(run)),
        ("architecture", model.get("architecture")),
        ("weights", model.get("weights")),
        ("dtype", model.get("dtype")),
        ("plan.json", run.plan_checksum),
        ("begun", run.study.get("created")),
        ("kvbits", run.study.get("versions", {}).get("kvbits")),
    )
    return Table((), tuple((name, str(value)) for name, value in known if value))


def differing_settings(runs: Sequence[tuple[str, Run]]) -> Table:
    """Settings, data and versions in which runs differ, a column per run."""
    flat = [
        dict(_flatten({k: v for k, v in run.study.items() if k != "command"})) for _, run in runs
    ]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = tuple(
        (name, *(each.get(name, "") for each in flat))
        for name in names
        if len({each.get(name, "") for each in flat}) > 1
    )
    return Table(("setting", *(name for name, _ in runs)), rows)


def splits(run: Run) -> Table:
    """The checksum of every domain's calibration and held-out set."""
    data = run.study.get("data", {})
    calibration, heldout = data.get("calibration", {}), data.get("heldout", {})
    rows = tuple(
        (domain, _text(checksum), _text(heldout.get(domain)))
        for domain, checksum in calibration.items()
    )
    return Table(("domain", "calibration set", "held-out set"), rows)


def separation(run: Run) -> str:
    """Say whether any set was used both to search and to verify."""
    data = run.study.get("data", {})
    shared = set(data.get("calibration", {}).values()) & set(data.get("heldout", {}).values())
    if shared:
        return (
            "Calibration and held-out data share a set: what is called held out was seen by the "
            "search."
        )
    return "Token sets by checksum. No set that the search saw was used to verify."


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
