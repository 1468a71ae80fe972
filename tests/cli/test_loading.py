"""Where models are put."""

from __future__ import annotations

import pytest

from kvbits.cli import models


def test_a_sharded_model_is_placed_by_accelerate(tiny_model_dir):
    pytest.importorskip("accelerate", reason="needs the extra `sharded`")
    loaded = models.load_model(str(tiny_model_dir), "sharded")
    assert loaded.model.hf_device_map
    assert not loaded.model.training


def test_sharding_without_accelerate_says_what_to_install(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvbits\[sharded\]'"):
        models.load_model(str(tiny_model_dir), "sharded")
