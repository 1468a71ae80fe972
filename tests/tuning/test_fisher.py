from __future__ import annotations

import numpy as np
import pytest
import torch
from test_sensitivity import make_meter, model, token_set  # noqa: F401

from kvbits.evaluation.corpora import TokenSet
from kvbits.tuning.candidates import of_mode
from kvbits.tuning.fisher import _own_loss, profile_fisher
from kvbits.tuning.progress import Silent
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.sensitivity import Meter, profile_kl


def many_documents(n: int) -> TokenSet:
    ids = torch.randint(1, 257, (n, 50), generator=torch.Generator().manual_seed(3))
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False
    return TokenSet("text", "text", "calibration", ids, counted)


@pytest.fixture(scope="module")
def profiles(model, tmp_path_factory):  # noqa: F811
    """Isolated KLs and their Fisher estimates of a random model, at 4 bits, by layer and side."""
    meter = Meter(model, [many_documents(16)], of_mode(model.config, "per_token", (4,)))
    run = RunDir(tmp_path_factory.mktemp("profiles"))
    kl = profile_kl(meter, run=run, progress=Silent())
    fisher = profile_fisher(meter, run=run, progress=Silent())
    return meter, run, kl, fisher


def test_fisher_estimates_the_isolated_kl(profiles):
    """Within a factor of two, and in the same order where KLs differ by more than that."""
    _, _, kl, fisher = profiles
    exact = {(r["layer"], r["label"]): r["kl_nats"] for r in kl}
    guess = {(r["layer"], r["label"]): r["kl_nats"] for r in fisher}
    assert exact.keys() == guess.keys()
    ratios = np.array([guess[key] / exact[key] for key in exact])
    assert ratios.min() > 0.4
    assert ratios.max() < 2.5


def test_finished_domains_are_read_again(profiles, monkeypatch):
    meter, run, _, fisher = profiles
    monkeypatch.setattr(meter, "model", None)
    assert profile_fisher(meter, run=run, progress=Silent()) == fisher


def test_heads_add_up_to_their_layer(model, tmp_path):  # noqa: F811
    sets = [token_set("text")]
    whole = of_mode(model.config, "per_token", (2,))
    heads = of_mode(model.config, "per_token", (2,), granularity="head")
    found = [
        profile_fisher(Meter(model, sets, each), run=RunDir(tmp_path / name), progress=Silent())
        for name, each in (("whole", whole), ("heads", heads))
    ]
    for record in found[0]:
        parts = [
            r["kl_nats"] for r in found[1]
            if r["layer"].startswith(f"{record['layer']}.") and r["label"] == record["label"]
        ]  # fmt: skip
        assert len(parts) == 2
        assert sum(parts) == pytest.approx(record["kl_nats"], rel=1e-4)


def test_only_counted_tokens_make_the_loss():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    counted = torch.tensor([False, False, True, False, True])
    loss = _own_loss(logits, counted, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert [bool(row.any()) for row in gradient] == [False, True, False, True, False]
