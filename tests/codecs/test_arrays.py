"""Arrays as values of codecs: what they refuse, and when two are one."""

from __future__ import annotations

import pytest
import torch

from kvbits.codecs.arrays import Array, Arrays, by_name


def test_arrays_are_equal_by_name_and_content():
    ones = Array("a.b", torch.ones(2, 3))
    assert ones == Array("a.b", torch.ones(2, 3))
    assert hash(ones) == hash(Array("a.b", torch.ones(2, 3)))
    for other in (
        Array("a.c", torch.ones(2, 3)),
        Array("a.b", torch.ones(3, 2)),
        Array("a.b", torch.ones(2, 3, dtype=torch.int32)),
        Array("a.b", torch.zeros(2, 3)),
    ):
        assert ones != other


def test_an_array_keeps_what_it_was_made_of():
    source = torch.ones(4)
    array = Array("a", source)
    source.zero_()
    assert array.tensor.tolist() == [1.0] * 4
    assert array.on(torch.device("cpu")) is array.tensor


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("", torch.ones(1), "name of an array must be words"),
        ("../a", torch.ones(1), r"name of an array must be words.*got '\.\./a'"),
        ("a..b", torch.ones(1), "name of an array must be words"),
        ("a", torch.ones(1, dtype=torch.float64), "a must be int32 or float32, got float64"),
        ("a", torch.ones(1, dtype=torch.bfloat16), "a must be int32 or float32, got bfloat16"),
        ("a", torch.tensor([1.0, torch.nan]), "a must be finite, got NaN or infinity"),
        ("a", torch.tensor([torch.inf]), "a must be finite, got NaN or infinity"),
    ],
)
def test_what_is_no_array_is_refused(name, tensor, message):
    with pytest.raises(ValueError, match=message):
        Array(name, tensor)


def test_shapes_are_checked():
    array = Array("a", torch.ones(2, 3))
    array.check_shape(None, 3)
    with pytest.raises(ValueError, match=r"a must have shape \[any, 4\], got \[2, 3\]"):
        array.check_shape(None, 4)
    with pytest.raises(ValueError, match=r"a must have shape \[2, 3, 1\], got \[2, 3\]"):
        array.check_shape(2, 3, 1)


def test_two_arrays_of_one_name_must_be_one():
    ones = Array("a", torch.ones(2))
    assert set(by_name([ones, Array("a", torch.ones(2))])) == {"a"}
    with pytest.raises(ValueError, match="names of their own, got two of 'a'"):
        by_name([ones, Array("a", torch.zeros(2))])


def test_what_was_not_taken_is_known():
    arrays = Arrays({"b": torch.ones(1), "a": torch.ones(1), "c": torch.ones(1)})
    assert arrays.take("b") == Array("b", torch.ones(1))
    assert arrays.take("d") is None
    assert arrays.unused == ["a", "c"]
