"""Time of a step by kind of kernel."""

from __future__ import annotations

import pytest

from kvbits.bench.step_profile import by_kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attend_int8", "attention"),
        ("merge_splits", "attention"),
        ("void flash::flash_fwd_splitkv_kernel<...>", "attention"),
        ("append_step", "append"),
        ("nvjet_tst_128x8_64x12_2x1_v_bz_TNT", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "matmul"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "other"),
    ],
)
def test_a_kernel_is_known_by_its_name(name, kind):
    assert by_kind([(name, 1.5)])[kind] == 1.5


def test_times_of_a_kind_add_up_and_absent_kinds_are_zero():
    found = by_kind([("append_step", 0.25), ("append_step", 0.5), ("gemm", 1.0)])
    assert found == {"attention": 0, "append": 0.75, "matmul": 1.0, "other": 0}
