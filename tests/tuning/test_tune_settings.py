from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvbits.tuning import TuneSettings
from kvbits.tuning.settings import RECIPES


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 0}, "greater than 0"),
        ({"text_documents": 1}, "greater than or equal to 2"),
        ({"widths": (5,)}, "widths must be among"),
        ({"widths": (4, 4)}, "each once"),
        ({"tasks": ("gsm8k",)}, "tasks must be among .*, got 'gsm8k'"),
        ({"text": "a.txt"}, "must be given together"),
        ({"strategy": "grid"}, "'exact', 'exact\\+', "),
        ({"bits": 4, "max_kl": 0.1}, "bits must be the only budget, got max_kl too"),
        ({"memory": 10**9}, "context must be given with memory"),
        ({"domain_weights": (1, 2, 3)}, "domain_weights must be given with objective sum"),
        ({"limits": (4,)}, "limits must be given with strategy moead, nsga2 or tpe"),
        ({"limits": (6,), "strategy": "moead"}, "limits must have one within the budget of 4"),
        ({"mode": "kivi", "candidates": ("kvarn",)}, "mode must not be given together"),
        ({"residual": 3}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        TuneSettings(**wrong)


def test_settings_survive_json_and_cannot_be_changed():
    settings = TuneSettings(bits=3.5, mode="kivi")
    assert TuneSettings.model_validate_json(settings.model_dump_json()) == settings
    with pytest.raises(ValidationError, match="frozen"):
        settings.bits = 4.0


def test_a_budget_of_another_kind_takes_the_place_of_four_bits():
    assert TuneSettings().bits == 4.0
    assert TuneSettings(max_kl=0.01).bits is None
    assert TuneSettings(memory=10**6, context=100).bits is None


def test_recipes_are_settings():
    for recipe in RECIPES.values():
        assert TuneSettings(**recipe).trials == 200
