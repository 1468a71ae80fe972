"""What makes a study this study: its settings, its data, the model and its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from kvbits._version import __version__
from kvbits.calibration.placement import stored_parameters
from kvbits.errors import CalibrationError
from kvbits.evaluation.corpora import TokenSet
from kvbits.geometry import ModelGeometry
from kvbits.plan import CachePlan
from kvbits.tuning.settings import TuneSettings

LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")
OPTIONAL_LIBRARIES = ("optuna",)


class Data(NamedTuple):
    """Token sets to tune on and, of the same domains, to verify on."""

    calibration: Sequence[TokenSet]
    heldout: Sequence[TokenSet]


def documents(data: Data) -> dict[str, dict[str, list[str]]]:
    """Return ``documents.json``: the SHA-256 of every document's tokens, by split and domain."""
    return {
        split: {
            token_set.domain: [
                hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
                for ids in token_set.documents
            ]
            for token_set in token_sets
        }
        for split, token_sets in data._asdict().items()
    }


def separation(data: Data) -> dict[str, int]:
    """Count the documents of both splits, and those they share: none.

    Raises:
        CalibrationError: A document is in both.
    """
    found = documents(data)
    calibration, heldout = (
        {digest for digests in found[split].values() for digest in digests}
        for split in Data._fields
    )
    shared = calibration & heldout
    if shared:
        raise CalibrationError(
            "held-out data must share no document with calibration data, got "
            f"{len(shared)} in both; give other texts, or more of them"
        )
    return {
        "calibration_documents": len(calibration),
        "heldout_documents": len(heldout),
        "shared_documents": len(shared),
    }


def identity(
    model: Any, settings: TuneSettings, data: Data, command: str | None = None
) -> dict[str, Any]:
    """Return ``study.json``: all that a resumed run must share with the one that began.

    The command, versions and the time of creation are for the reader and are not compared.
    """
    geometry = ModelGeometry.from_config(model.config)
    return {
        "schema_version": 1,
        "model_id": CachePlan.uniform(model.config, 16, 16).model_id,
        "mode": settings.mode,
        "settings": settings.model_dump(mode="json"),
        "data": {
            split: {token_set.domain: token_set.checksum for token_set in token_sets}
            for split, token_sets in data._asdict().items()
        },
        "split": separation(data),
        "model": {
            "architecture": geometry.architecture,
            "fingerprint": geometry.fingerprint,
            "weights": weights_checksum(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": [layer.model_dump(mode="json") for layer in geometry.layers],
        },
        "command": command,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Return the versions of kvbits and of the libraries that results depend on."""
    found = {name: version(name) for name in LIBRARIES}
    for name in OPTIONAL_LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"kvbits": __version__, **found}


def weights_checksum(model: Any, values_per_tensor: int = 4096) -> str:
    """Return a SHA-256 over evenly spaced values of every parameter: cheap for any model size."""
    digest = hashlib.sha256()
    for name, parameter in sorted(stored_parameters(model), key=lambda named: named[0]):
        flat = parameter.detach().flatten()
        if flat.device.type == "meta":
            raise CalibrationError(
                f"weights of the model must be within reach, got {name} on the meta device"
            )
        sample = flat[:: max(1, flat.numel() // values_per_tensor)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()
