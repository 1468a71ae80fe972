"""Fixtures of the tuning tests."""

from __future__ import annotations

import pytest
from tuning_synthetic import make_problem

from kvbits.tuning.problem import Problem


@pytest.fixture
def problem() -> Problem:
    return make_problem(6, (8, 4, 2), seed=0)
