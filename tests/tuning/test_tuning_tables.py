from __future__ import annotations

import pytest
from tuning_synthetic import make_costs

from kvbits.errors import RecordError
from kvbits.tuning.tables import Candidate, SensitivityTable, sensitivity_table

SIDES = ("K4", "kvarn V2")


def records(layers: tuple[int, ...]) -> list[dict[str, object]]:
    return [
        {"domain": "text", "layer": layer, "label": label, "kl_nats": layer + number / 4}
        for layer in layers
        for number, label in enumerate(SIDES)
    ]


def table_of(lines, layers: tuple[int, ...]) -> SensitivityTable:
    return sensitivity_table(lines, domains=("text",), sides=SIDES, layers=layers)


def test_table_rows_follow_the_given_layers():
    table = table_of(reversed(records((3, 5))), (3, 5))
    assert table.kl_nats[0].tolist() == [[3.0, 3.25], [5.0, 5.25]]


def test_table_refuses_gaps_and_names_the_first():
    with pytest.raises(RecordError, match="1 gaps, first at layer 5, kvarn V2, text"):
        table_of(records((3, 5))[:-1], (3, 5))


def test_rounding_noise_below_zero_counts_as_zero():
    assert (table_of([r | {"kl_nats": -1e-9} for r in records((0,))], (0,)).kl_nats == 0).all()


def test_candidates_add_their_sides_and_exact_sides_cost_nothing():
    candidates = [Candidate("K16V16", None, None), Candidate("a", "K4", "kvarn V2")]
    candidates.append(Candidate("b", None, "kvarn V2"))
    kl = table_of(records((1, 2)), (1, 2)).candidate_kl(candidates)
    assert kl[0].tolist() == [[0.0, 2.25, 1.25], [0.0, 4.25, 2.25]]


def test_effective_bits_count_metadata():
    costs = make_costs(3, (4, 2))
    assert costs.effective_bits((1, 1, 1)) == 4.5
    assert costs.total((0, 0, 0)) * costs.unit_bits == 16 * costs.num_values


def test_budget_is_rounded_down_but_not_by_float_noise():
    costs = make_costs(3, (4, 2))
    assert costs.budget(4.5) == costs.total((1, 1, 1))
    assert costs.budget(4.49) == costs.total((1, 1, 1)) - 1
