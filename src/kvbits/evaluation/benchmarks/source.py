"""Where data files of benchmarks come from: a folder, or the Hugging Face hub by name."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from kvbits.errors import RecordError
from kvbits.evaluation.jsonl import json_objects, parse


class Row(BaseModel):
    """One line of a data file. Keys that are not needed are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


R = TypeVar("R", bound=Row)


class Hub(NamedTuple):
    """A dataset of the Hugging Face hub.

    Attributes:
        path: Its id.
        split: The split.
        config: The configuration, if it has several.
    """

    path: str
    split: str
    config: str | None = None

    def __str__(self) -> str:
        config = f", configuration {self.config}" if self.config else ""
        return f"{self.path}{config}, split {self.split}"


@dataclass(frozen=True)
class DataFile(Generic[R]):
    """A file of one JSON object a line, or of a list of them.

    Args:
        name: Its path in the folder.
        row: What a line holds.
        hub: The same data on the Hugging Face hub, if it lies there with the same keys.
        origin: Where else to get it.
        key: Where the rows lie in the one JSON object that the file is, if it is one.
    """

    name: str
    row: type[R]
    hub: Hub | None = None
    origin: str = ""
    key: str | None = None

    @property
    def schema(self) -> str:
        """The keys of a line, such as ``question, answer``."""
        return ", ".join(
            f"[{name}]" if not field.is_required() else name
            for name, field in self.row.model_fields.items()
        )

    @property
    def form(self) -> str:
        """What the file looks like, in words."""
        layout = "one JSON object a line" if self.key is None else f"one JSON list {self.key!r}"
        return f"{layout} with {self.schema}"

    @property
    def place(self) -> str:
        """Where to get it."""
        hub = f"{self.hub} on the Hugging Face hub" if self.hub else ""
        return " or ".join(part for part in (hub, self.origin) if part)

    def objects(self, data: bytes, path: Path) -> list[dict[str, Any]]:
        """Rows of the file's bytes, not yet checked against the schema."""
        return _objects(data, path, self.key)


class Source(ABC):
    """Reads data files, and keeps the checksum of each."""

    def __init__(self) -> None:
        self.checksums: dict[str, str] = {}

    @abstractmethod
    def check(self, files: Iterable[DataFile[Any]]) -> None:
        """Say at once that a file is missing, where that can be seen without reading it.

        Raises:
            ValueError: As by ``read``.
        """

    @abstractmethod
    def read(self, file: DataFile[R]) -> list[R]:
        """Read the rows of a file.

        Raises:
            ValueError: If it is missing; the message says where to get it and its format.
            RecordError: If a line is not of its schema.
        """


class FolderSource(Source):
    """Data files of a folder.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        if not folder.is_dir():
            raise ValueError(f"--data must be a folder, got {str(folder)!r}")
        self.folder = folder

    def check(self, files: Iterable[DataFile[Any]]) -> None:
        for file in files:
            if not (self.folder / file.name).is_file():
                raise ValueError(
                    f"--data must hold {file.name}, got {str(self.folder)!r} without it; take "
                    f"{file.place}, as {file.form}"
                )

    def read(self, file: DataFile[R]) -> list[R]:
        self.check([file])
        path = self.folder / file.name
        text = path.read_bytes()
        self.checksums[file.name] = hashlib.sha256(text).hexdigest()
        rows = [
            parse(file.row, value, f"{path}:{number}")
            for number, value in enumerate(file.objects(text, path), start=1)
        ]
        if not rows:
            raise RecordError(f"{path} must hold at least one line, got none")
        return rows


def _objects(data: bytes, path: Path, key: str | None) -> list[dict[str, Any]]:
    if key is None:
        return json_objects(data.split(b"\n"), path)
    try:
        found = json.loads(data)[key]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} must be a JSON object with {key!r}, got another") from error
    if not isinstance(found, list):
        raise RecordError(f"{path} {key} must be a list, got {type(found).__name__}")
    return found


class HubSource(Source):
    """Data sets of the Hugging Face hub, by the package ``datasets``; needs a network."""

    def check(self, files: Iterable[DataFile[Any]]) -> None:
        for file in files:
            if file.hub is None:
                raise ValueError(
                    f"{file.name} must be read from a folder, got no --data; {_remedy(file)}"
                )

    def read(self, file: DataFile[R]) -> list[R]:
        self.check([file])
        assert file.hub is not None
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError(
                f"{file.name} must be read from a folder or with the package datasets, got no "
                f"--data and no such package; pip install 'kvbits[data]', or {_remedy(file)}"
            ) from None
        try:
            found: Any = load_dataset(file.hub.path, file.hub.config, split=file.hub.split)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{file.hub} must be reachable without --data, got {reason}; or {_remedy(file)}"
            ) from error
        values = [json.loads(json.dumps(value, default=str)) for value in found]
        text = json.dumps(values, sort_keys=True)
        self.checksums[file.name] = hashlib.sha256(text.encode()).hexdigest()
        return [
            parse(file.row, value, f"{file.hub.path}:{number}")
            for number, value in enumerate(values, start=1)
        ]


def _remedy(file: DataFile[Any]) -> str:
    return f"put {file.name} into a folder and pass it as --data: {file.place}, as {file.form}"


def open_source(data: Path | None) -> Source:
    """The source of a run: the folder, or without one the hub."""
    return HubSource() if data is None else FolderSource(data)
