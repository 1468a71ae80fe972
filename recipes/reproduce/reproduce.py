"""What the recipes of published tables share: the numbers, the models, the table that is printed.

A recipe says how one row and column is measured. Everything else is here: which plan a row of the
published file means, loading the model or, with ``--dry-run``, a tiny random one with as many
layers, resuming, and printing our number beside the published one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from kvbits import CachePlan
from kvbits.cli.models import load_config, load_model
from kvbits.evaluation.benchmarks import Benchmark
from kvbits.evaluation.benchmarks.running import RunSettings, make_items
from kvbits.evaluation.benchmarks.scored import scored
from kvbits.evaluation.benchmarks.source import Source, open_source
from kvbits.evaluation.records import library_versions
from kvbits.methods import build_method
from kvbits.plan.files import write_text
from kvbits.testing.models import tiny_model

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parents[1] / "models" / "kvbits-tiny"
BYTES_CONTEXT = 300  # tokens of the cache whose bytes a dry run compares with the formula
AVERAGE = "average"
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


class Model(NamedTuple):
    """A model of a published table.

    Attributes:
        id: Its name on the Hugging Face hub.
        family: Architecture, for a dry run.
        layers: Decoder layers.
        rows: Published rows: ``config``, ``plan`` and ``published`` numbers by column.
        window: Tokens of a window of text, where the table is one of perplexities.
    """

    id: str
    family: str
    layers: int
    rows: list[dict[str, Any]]
    window: int = 0


class Published(NamedTuple):
    """A table as published."""

    table: str
    citation: str
    unit: str
    note: str
    columns: list[str]
    models: list[Model]

    def model(self, name: str | None) -> Model:
        """The model of a hub id, or of the end of a folder's name; the first if none is named.

        Raises:
            SystemExit: If the table has no such model.
        """
        if name is None:
            return self.models[0]
        for model in self.models:
            if model.id.rsplit("/", 1)[-1].lower() == name.rstrip("/").rsplit("/", 1)[-1].lower():
                return model
        raise SystemExit(
            f"MODEL must be among {', '.join(model.id for model in self.models)}, or a folder "
            f"that ends like one of them, got {name!r}; pass --as ID for another folder"
        )


def read_published(name: str) -> Published:
    """Read a file of published numbers."""
    found = json.loads((HERE / "published" / f"{name}.json").read_text(encoding="utf-8"))
    models = [
        Model(m["id"], m["family"], m["layers"], m["rows"], m.get("window", 0))
        for m in found["models"]
    ]
    fields = {key: found[key] for key in ("table", "citation", "unit", "note", "columns")}
    return Published(**fields, models=models)


def plan_of(
    wanted: dict[str, Any] | None, model: Any, documents: Callable[[], list[Tensor]]
) -> CachePlan | None:
    """The plan that a published row means; None is full precision.

    Args:
        wanted: The row's ``plan``.
        model: The model.
        documents: Makes the calibration documents, if the method needs them.
    """
    if wanted is None:
        return None
    if "uniform" in wanted:
        return CachePlan.uniform(model.config, *wanted["uniform"], mode=wanted["mode"])
    settings = dict(wanted)
    method = build_method(settings.pop("method"), **settings)
    return method.calibrate(model, documents() if method.needs_data else [])


class Recipe:
    """One run of a recipe.

    Args:
        name: File of the published numbers.
        arguments: What `parse` returned.
        write_data: Writes small files of the recipe's data into a folder, for a dry run.
        load: Loads the model and its tokenizer.
    """

    def __init__(
        self,
        name: str,
        arguments: argparse.Namespace,
        write_data: Callable[[Path], None] | None = None,
        load: Callable[[argparse.Namespace], tuple[Any, Any]] | None = None,
    ) -> None:
        self.published, self.arguments = read_published(name), arguments
        self.entry, self.name = self.published.model(arguments.as_id or arguments.model), name
        if arguments.dry_run:
            self.model, self.tokenizer = _tiny(self.entry)
            self.limit: int | None = arguments.limit or 1
            data = arguments.out / self.name / "data"
            data.mkdir(parents=True, exist_ok=True)
            if write_data is not None:
                write_data(data)
        else:
            self._check(arguments.model)
            self.model, self.tokenizer = (load or _load)(arguments)
            self.limit, data = arguments.limit, arguments.data
        self.data: Path | None = data
        self.rows = [row for row in self.entry.rows if re.search(arguments.only, row["config"])]
        chosen = arguments.columns.split(",") if arguments.columns else self.published.columns
        self.columns = [name for name in self.published.columns if name in chosen]

    def _check(self, name: str | None) -> None:
        if name is None:
            raise SystemExit("MODEL must be given, got none; or pass --dry-run")
        layers = load_config(name).get_text_config().num_hidden_layers
        if layers != self.entry.layers:
            raise SystemExit(
                f"MODEL must have {self.entry.layers} layers as {self.entry.id}, got {layers}"
            )

    def source(self) -> Source:
        """A new reader of the data: a run records what it read itself, and nothing else."""
        return open_source(self.data)

    def plan(
        self, row: dict[str, Any], documents: Callable[[], list[Tensor]] = list
    ) -> CachePlan | None:
        """The plan of a row, made once and then read from ``--out``."""
        path = self.folder(row) / "plan.json"
        if path.exists():
            return CachePlan.load(path)
        plan = plan_of(row["plan"], self.model, documents)
        if plan is not None:
            plan.save(path)
        return plan

    def folder(self, row: dict[str, Any]) -> Path:
        """Where a row is kept."""
        return self._home / _slug(row["config"])

    @property
    def _home(self) -> Path:
        """Where the model's rows are kept; those of a dry run lie apart."""
        kind = "-dry-run" if self.arguments.dry_run else ""
        made: Path = self.arguments.out / self.name / (self.entry.id.rsplit("/", 1)[-1] + kind)
        return made

    def score(
        self, row: dict[str, Any], plan: CachePlan | None, benchmark: Benchmark, **settings: Any
    ) -> dict[str, Any]:
        """Run a benchmark, or read what the same run found before.

        Args:
            row: The published row.
            plan: Its plan.
            benchmark: The benchmark.
            **settings: Of ``RunSettings``; ``column`` names the folder.
        """
        column = settings.pop("column")
        run = RunSettings(limit=self.limit, batch_size=self.arguments.batch_size, **settings)
        source = self.source()
        items = make_items(benchmark, source, self.tokenizer, run)
        return scored(
            benchmark,
            items,
            self.model,
            self.tokenizer,
            plan,
            run,
            source,
            facts={"model": self.entry.id, "is_dry_run": self.arguments.dry_run},
            folder=self.folder(row) / column,
        )

    def run(
        self,
        measure: Callable[[dict[str, Any], CachePlan | None, str], float | None],
        documents: Callable[[], list[Tensor]] = list,
    ) -> list[dict[str, Any]]:
        """Measure every row and column, print the table and keep it as JSON.

        Args:
            measure: The number of a row, its plan and a column.
            documents: Makes calibration documents.
        """
        found = []
        for row in self.rows:
            plan = self.plan(row, documents)
            columns = [name for name in self.columns if name != AVERAGE]
            ours = {name: measure(row, plan, name) for name in columns}
            known = [value for value in ours.values() if value is not None]
            if AVERAGE in self.columns and len(columns) == len(self.published.columns) - 1:
                ours[AVERAGE] = sum(known) / len(known)
            found.append(
                {
                    "config": row["config"],
                    "effective_bits": 16.0 if plan is None else plan.effective_bits,
                    "ours": ours,
                    "published": row["published"],
                    "cache_bytes": self._bytes(plan),
                }
            )
        self._keep(found)
        self._print(found)
        return found

    @property
    def device(self) -> str:
        """What it ran on."""
        device = self.model.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def _bytes(self, plan: CachePlan | None) -> int:
        """Bytes of the cache at ``BYTES_CONTEXT`` tokens: measured in a dry run, as the formula.

        Raises:
            SystemExit: If the two differ.
        """
        plan = plan or CachePlan.uniform(self.model.config, 16, 16)
        bits = 8 * self.model.dtype.itemsize
        formula = plan.bytes(BYTES_CONTEXT, state_bits=bits)
        if self.arguments.dry_run:
            cache = plan.new_cache(self.model)
            ids = torch.arange(BYTES_CONTEXT)[None] % 4000
            with torch.no_grad():
                self.model(ids.to(self.model.device), past_key_values=cache)
            if cache.nbytes != formula:
                raise SystemExit(f"cache must take {formula} bytes, got {cache.nbytes}: {plan}")
        return formula

    def _keep(self, found: list[dict[str, Any]]) -> None:
        kept = {
            "citation": self.published.citation,
            "model": self.entry.id,
            "is_dry_run": self.arguments.dry_run,
            "limit": self.limit,
            "versions": library_versions() | {"device": self.device},
            "rows": found,
        }
        write_text(self._home / "table.json", json.dumps(kept, indent=2) + "\n")

    def _print(self, found: Sequence[dict[str, Any]]) -> None:
        table = Table("config", "effective bits", *self.columns)
        for row in found:
            cells = [_cell(row["ours"].get(n), row["published"].get(n)) for n in self.columns]
            table.add_row(row["config"], f"{row['effective_bits']:.2f}", *cells)
        console = Console(width=40 + 24 * len(self.columns))
        console.print(f"{self.published.table}\n{self.published.citation}\nmodel: {self.entry.id}")
        console.print(f"on: {self.device}, {str(self.model.dtype).removeprefix('torch.')}")
        console.print(table)
        console.print(f"each cell: ours, (published); {self.published.unit}")
        console.print(self.published.note)
        if self.arguments.dry_run:
            console.print("Dry run on a tiny random model: our numbers mean nothing.")
        elif self.limit is not None:
            console.print(f"Only {self.limit} items of each part were run.")


def parse(description: str, default_out: str = "runs/reproduce") -> argparse.ArgumentParser:
    """The options that every recipe has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model", nargs="?", help="model folder or hub id; none with --dry-run")
    made.add_argument("--as", dest="as_id", help="which published model a folder holds")
    made.add_argument("--data", type=Path, help="folder with data files; default: the hub")
    made.add_argument("--out", type=Path, default=Path(default_out), help="folder; resumable")
    made.add_argument("--only", default="", help="rows whose names this pattern finds")
    made.add_argument("--columns", help="columns, with commas between")
    made.add_argument("--limit", type=int, help="items of each part at most")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto")
    made.add_argument(
        "--dry-run", action="store_true", help="a tiny random model with as many layers"
    )
    return made


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    loaded = load_model(arguments.model, arguments.device, arguments.dtype)
    return loaded.model, loaded.tokenizer


def _tiny(entry: Model) -> tuple[Any, Any]:
    """A random model of the family with the published number of layers, and a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = CHAT
    window = {"sliding_window": None} if entry.family == "mistral" else {}
    model = tiny_model(
        entry.family,
        num_hidden_layers=entry.layers,
        vocab_size=len(tokenizer),
        max_position_embeddings=16384,
        **window,
    )
    return model, tokenizer


def _cell(ours: float | None, published: float | None) -> str:
    left = "–" if ours is None else f"{ours:.4g}"
    return left if published is None else f"{left} ({published:.4g})"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()
