"""Where models are put."""

from __future__ import annotations

import pytest

from kvbits.cli import models


def test_a_sharded_model_is_placed_by_accelerate_and_not_moved(tiny_model_dir, monkeypatch):
    pytest.importorskip("accelerate", reason="needs the extra `sharded`")
    asked, fetch = [], models._fetch

    def spy(load, name, **settings):
        asked.append(settings)
        return fetch(load, name, **settings)

    monkeypatch.setattr(models, "_fetch", spy)
    monkeypatch.setattr("torch.nn.Module.to", None)
    loaded = models.load_model(str(tiny_model_dir), "sharded")
    assert asked[-1]["device_map"] == "auto"
    assert not loaded.model.training


def test_sharding_without_accelerate_says_what_to_install(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvbits\[sharded\]'"):
        models.load_model(str(tiny_model_dir), "sharded")
