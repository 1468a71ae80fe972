"""Plans on the Hugging Face hub: a repository with the plan and a card that says what it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import yaml

from kvbits import memory
from kvbits.errors import PlanError
from kvbits.plan import arrays, files, loading, summary

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from kvbits.plan.cache_plan import CachePlan
    from kvbits.plan.provenance import Metric

PLAN_FILE, CARD_FILE = "plan.json", "README.md"
CONTEXTS = (4096, 32768, 131072)


def push(
    plan: CachePlan,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    message: str = "Add a cache plan",
) -> str:
    """Commit a plan, its arrays and its card to a model repository; see ``push_to_hub``."""
    from huggingface_hub import CommitOperationAdd

    with TemporaryDirectory() as folder:
        plan.save(Path(folder, PLAN_FILE))
        Path(folder, CARD_FILE).write_text(card(plan, repo_id), encoding="utf-8")
        operations = [
            CommitOperationAdd(path.name, path.read_bytes())
            for path in sorted(Path(folder).iterdir())
        ]
    with _failures(repo_id):
        api = _api(token, endpoint)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)


def pull(
    repo_id: str,
    folder: Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetch the plan of a repository, and the arrays it names, into a folder; see ``from_hub``."""
    api = _api(token, endpoint)

    def fetch(name: str) -> Path:
        with _failures(repo_id):
            return Path(api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder))

    path = fetch(PLAN_FILE)
    data = loading.parse_object(files.read_text(path), str(path))
    named = arrays.parse(data.get(arrays.FIELD))
    if named is not None:
        fetch(named.file)
    return path


def card(plan: CachePlan, repo_id: str) -> str:
    """The page of a plan's repository, in Markdown: what it is, what it costs, what was measured.

    Args:
        plan: The plan.
        repo_id: Where it is kept.
    """
    name = _plain(plan.model_id or plan.model.architecture)
    parts = [
        _front_matter(plan),
        f"# A KV cache plan for {name}",
        f"{_plain(plan.describe())}.",
        _usage(repo_id),
        "## Layers",
        _layers(plan),
        "## Memory",
        _memory(plan),
    ]
    if plan.metrics:
        parts += ["## Measured", _metrics(plan.metrics)]
    return "\n\n".join([*parts, "## Where it comes from", _origin(plan)]) + "\n"


def _front_matter(plan: CachePlan) -> str:
    data: dict[str, object] = {"library_name": "kvbits", "tags": ["kvbits", "kv-cache"]}
    if plan.model_id and plan.model_id.count("/") == 1:  # a folder's name is no model of the hub
        data["base_model"] = plan.model_id
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def _usage(repo_id: str) -> str:
    return "\n".join(
        (
            "```python",
            "from kvbits import CachePlan",
            "",
            f'cache = CachePlan.from_hub("{repo_id}").new_cache(model)',
            "model.generate(**inputs, past_key_values=cache)",
            "```",
        )
    )


def _layers(plan: CachePlan) -> str:
    """A row for every kind of layer plan, with the layers that have it."""
    rows = ["| layers | widths | effective bits |", "| --- | --- | --- |"]
    for part in summary.layer_parts(plan.layers, plan.model):
        name, _, indices = part.rpartition(" ")
        index = int(indices.split(",")[0].split("-")[0])
        layer = plan.model.layers[index]
        bits = float(memory.layer_effective_bits(plan.layers[index], layer))
        rows.append(f"| {indices} | {name} | {bits:.2f} |")
    return "\n".join(rows)


def _memory(plan: CachePlan) -> str:
    rows = ["| tokens | bytes | at 16 bits |", "| --- | --- | --- |"]
    for context in CONTEXTS:
        rows.append(f"| {context:,} | {plan.bytes(context):,} | {plan.bytes_16bit(context):,} |")
    return "\n".join(rows)


def _metrics(metrics: tuple[Metric, ...]) -> str:
    rows = [
        "| what | value | standard error | data | samples |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in metrics:
        error = "" if metric.standard_error is None else f"{metric.standard_error:.3g}"
        data = "" if metric.dataset is None else metric.dataset.name
        cells = (metric.name, f"{metric.value:.5g}", error, data, str(metric.num_samples or ""))
        rows.append(f"| {' | '.join(map(_plain, cells))} |")
    return "\n".join(rows)


def _origin(plan: CachePlan) -> str:
    made = plan.provenance
    lines = [f"- written by kvbits {_plain(plan.kvbits_version)}"]
    lines.append(f"- made for the geometry {plan.fingerprint}")
    if made is not None:
        lines.append(f"- widths chosen by: {_plain(made.method)}")
        lines += [f"- mode: {_plain(made.mode)}"] if made.mode else []
        lines += [
            f"- calibrated on {_plain(each.name)}, SHA-256 {_plain(each.checksum)}"
            for each in made.datasets
        ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text of a plan as one line that cannot end a cell or open markup."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "|<>[]`\\" else letter for letter in line)


def _api(token: str | None, endpoint: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=token, library_name="kvbits")


@contextmanager
def _failures(repo_id: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # OSError, and whatever the HTTP library of the client's release raises for a lost server.
    expected: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError)
    try:
        yield
    except expected as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PlanError(
            f"repo_id must name a repository the hub lets you use, got {repo_id!r}: {reason}"
        ) from error
