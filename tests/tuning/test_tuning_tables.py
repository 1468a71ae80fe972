from __future__ import annotations

import numpy as np
import pytest
from tuning_synthetic import make_costs

from kvbits.errors import RecordError
from kvbits.tuning.tables import SIDES, SensitivityTable, candidate_pairs, sensitivity_table


def records(layers: tuple[int, ...]) -> list[dict[str, object]]:
    return [
        {"domain": "text", "layer": layer, "side": side, "bits": bits, "kl_nats": layer + 1 / bits}
        for layer in layers
        for side in SIDES
        for bits in (4, 2)
    ]


def test_candidates_are_every_pair_and_the_exact_one():
    pairs = candidate_pairs((8, 4, 2))
    assert len(pairs) == len(set(pairs)) == 10
    assert pairs[0] == (16, 16)
    assert (16, 4) not in pairs


def test_table_rows_follow_the_given_layers():
    table = sensitivity_table(
        reversed(records((3, 5))), domains=("text",), widths=(4, 2), layers=(3, 5)
    )
    assert table.kl_nats[0, 1, 0].tolist() == [5.25, 5.5]


def test_table_refuses_gaps_and_names_the_first():
    with pytest.raises(RecordError, match="1 gaps, first at layer 5, value, 2 bits, text"):
        sensitivity_table(records((3, 5))[:-1], domains=("text",), widths=(4, 2), layers=(3, 5))


def test_rounding_noise_below_zero_counts_as_zero():
    lines = [line | {"kl_nats": -1e-9} for line in records((0,))]
    table = sensitivity_table(lines, domains=("text",), widths=(4, 2), layers=(0,))
    assert (table.kl_nats == 0).all()


def test_pair_kl_adds_the_sides_and_sixteen_bits_cost_nothing():
    kl_nats = np.arange(1.0, 5.0).reshape(1, 1, 2, 2)  # key 4, key 2; value 4, value 2
    table = SensitivityTable(("text",), (4, 2), kl_nats)
    assert table.pair_kl(((16, 16), (4, 2), (2, 4)))[0, 0].tolist() == [0.0, 5.0, 5.0]


def test_effective_bits_count_metadata():
    costs = make_costs(3, (4, 2))
    assert costs.effective_bits((1, 1, 1)) == 4.5
    assert costs.total((0, 0, 0)) * costs.unit_bits == 16 * costs.num_values


def test_budget_is_rounded_down_but_not_by_float_noise():
    costs = make_costs(3, (4, 2))
    assert costs.budget(4.5) == costs.total((1, 1, 1))
    assert costs.budget(4.49) == costs.total((1, 1, 1)) - 1
