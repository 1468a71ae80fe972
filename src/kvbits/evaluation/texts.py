"""Reading texts: from files given by path, and from the sample that kvbits bundles."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from kvbits.errors import CalibrationError

DOCUMENT_END = "<|endoftext|>"
_SUFFIXES = (".txt", ".raw", ".jsonl")


def read_texts(path: str | Path) -> list[str]:
    """Read the documents of a file, or of every text file of a folder in the order of their names.

    A ``.jsonl`` file holds one object a line with the key ``text``; any other file is plain text,
    in which lines ``<|endoftext|>`` separate documents.

    Raises:
        FileNotFoundError: nothing is there.
        CalibrationError: there is no document, a line is not of the form above, or a file is no
            text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path must be an existing file or folder, got {str(path)!r}")
    parts = [path]
    if path.is_dir():
        parts = sorted(item for item in path.iterdir() if item.suffix in _SUFFIXES)
    texts = [text for part in parts for text in _documents(part)]
    if not texts:
        raise CalibrationError(f"path must hold at least one document, got {str(path)!r}")
    return texts


def dataset_texts(name: str) -> list[str]:
    """Fetch the column ``text`` of a Hugging Face dataset by name; needs a network.

    Args:
        name: ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``; the split is ``test`` by default.

    Raises:
        ValueError: the package datasets is missing, the dataset cannot be had, or it has no
            column ``text``.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"dataset must be read with the package datasets, got {name!r} without it; "
            "pip install 'kvbits[datasets]'"
        ) from None
    path, config, split = (*name.split(":"), "", "")[:3]
    try:
        found = load_dataset(path, config or None, split=split or "test")
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(
            f"dataset must be on this machine or within reach of it, got {name!r}: {reason}; "
            "without a network give a file of texts in its place"
        ) from error
    if "text" not in found.column_names:
        raise ValueError(f"dataset must have a column 'text', got {found.column_names} in {name}")
    return [text for text in found["text"] if text.strip()]


def bundled_texts(split: str) -> list[str]:
    """Return the bundled sample of kvbits-tiny for ``calibration`` or ``heldout``.

    Raises:
        CalibrationError: this installation carries no sample.
    """
    name = f"selfsample_{split}.jsonl"
    resource = files("kvbits.evaluation").joinpath("data").joinpath(name)
    if not resource.is_file():
        raise CalibrationError(f"{name} is missing from this installation; give a text file")
    return _json_lines(resource.read_text(encoding="utf-8"), name)


def _documents(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"path must be text in UTF-8, got {str(path)!r} with other bytes at {error.start}"
        ) from None
    if path.suffix == ".jsonl":
        return _json_lines(text, str(path))
    parts = [part.strip("\n") for part in text.split(DOCUMENT_END)]
    return [part for part in parts if part.strip()]


def _json_lines(text: str, source: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f'{source}:{number} must be a JSON object with the key "text", got {line[:60]!r}'
            ) from error
        texts.append(str(found))
    return texts
