from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvbits.tuning import TuneSettings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 0}, "greater than 0"),
        ({"text_documents": 1}, "greater than or equal to 2"),
        ({"widths": (5,)}, "widths must be among"),
        ({"widths": (4, 4)}, "each once"),
        ({"tasks": ("gsm8k",)}, "tasks must be among .*, got 'gsm8k'"),
        ({"text": "a.txt"}, "must be given together"),
        ({"strategy": "tpe"}, "'exact' or 'nsga2'"),
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
