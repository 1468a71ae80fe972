"""Strict parsing of plans: a refusal is one sentence that names the field, the rule, the value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from kvbits.errors import PlanError

MAX_VALUE_CHARACTERS = 60


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        PlanError: If the text is not JSON, repeats a key, holds NaN or infinity, or is no object.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"{source} must hold valid JSON, got {error.msg.lower()} "
            f"at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise PlanError(f"{source} must hold a plan, got JSON that is nested too deeply") from None
    except ValueError as error:  # an integer of more than 4300 digits
        raise PlanError(f"{source} must hold a plan, got {error}") from None
    if not isinstance(data, dict):
        raise PlanError(f"{source} must hold a JSON object, got {shorten(data)}")
    return data


def check_header(data: dict[str, Any], file_format: str, version: int, source: str) -> None:
    """Refuse files that are no plan at all, and plans of a schema this version does not know.

    Raises:
        PlanError: If ``format`` or ``schema_version`` is missing or not understood.
    """
    found = data.get("format")
    if found != file_format:
        raise PlanError(
            f"format must be {file_format!r}, got {shorten(found)}; {source} is not a kvbits plan"
        )
    found = data.get("schema_version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise PlanError(f"schema_version must be a positive integer, got {shorten(found)}")
    if found > version:
        raise PlanError(
            f"schema_version must be at most {version}, got {found}; upgrade kvbits to read it"
        )


def one_sentence(error: ValidationError) -> str:
    """Say the first thing wrong with a plan as ``<field> must <rule>, got <value>``."""
    details = error.errors(include_url=False)
    unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]
    detail = (unknown or details)[0]  # a misspelt field also shows as a missing one
    field, kind = field_path(detail["loc"]), detail["type"]
    context = detail.get("ctx", {})
    value = shorten(detail["input"])
    if kind == "extra_forbidden":
        return f"{field} must not be given, got {value}; no such field exists, so remove it"
    if kind == "missing":
        return f"{field} must be given, got nothing"
    if kind == "union_tag_not_found":
        return f"{field}.kind must be given, got nothing"
    if kind == "union_tag_invalid":
        kinds = str(context["expected_tags"]).replace("'", "")
        return (
            f"{field}.kind must be one of {kinds}, got {context['tag']!r}; "
            "a newer kvbits may know it"
        )
    if kind == "too_short":
        least = context["min_length"]
        return f"{field} must have at least {least} entries, got {context['actual_length']}"
    if kind == "too_long":
        most = context["max_length"]
        return f"{field} must have at most {most} entries, got {context['actual_length']}"
    if kind in ("value_error", "assertion_error"):
        return f"{field}: {context['error']}" if field else str(context["error"])
    rule = detail["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return f"{field or 'plan'} must be {rule[:1].lower()}{rule[1:]}, got {value}"


def field_path(location: Sequence[str | int]) -> str:
    """``('layers', 3, 'groups', 0, 'key', 'affine', 'bits')`` to ``layers[3].groups[0].key.bits``.

    The tag that tells codecs apart is not a field of the file and is left out.
    """
    path = ""
    for index, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (index and location[index - 1] in ("key", "value", "inner")):
            path += f".{part}" if path else part
    return path


def shorten(value: object) -> str:
    """A value as one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 3]}..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise PlanError(f"{key} must be given once per object, got it twice")
        unique[key] = value
    return unique


def _refuse_constant(name: str) -> Any:
    raise PlanError(f"numbers must be finite, got {name}")
