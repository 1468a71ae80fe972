"""OSCAR's rotations: what they are made of, and that they are as described."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvbits import CachePlan
from kvbits.calibration.capture import observe
from kvbits.calibration.rotation import Covariance, reversed_bits, value_weights
from kvbits.codecs import MatrixRotated, Rotated
from kvbits.errors import CalibrationError, PlanError, UnsupportedModelError
from kvbits.methods import build_method
from kvbits.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 90, (n,), generator=generator) for n in (200, 90, 33)]


def sylvester(width):
    """The orthonormal Hadamard matrix, by its definition."""
    bits = [[bin(row & column).count("1") for column in range(width)] for row in range(width)]
    return (-1.0) ** np.array(bits) / np.sqrt(width)


def test_numbers_are_read_backwards():
    assert reversed_bits(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert reversed_bits(1).tolist() == [0]


def test_a_rotation_is_eigenvectors_then_hadamard_then_reversal():
    """Taken apart again with numpy: what is left is diagonal, from largest to least."""
    x = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0))
    x[..., 2] *= 7
    weights = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    covariance = Covariance()
    covariance.add(x[:2], weights[:2])
    covariance.add(x[2:], weights[2:])
    rotation = covariance.rotation().double().numpy()
    rows, w = x.flatten(0, 1).double().numpy(), weights.flatten().double().numpy()
    expected = sum(weight * np.outer(row, row) for weight, row in zip(w, rows, strict=True))
    order = [int(f"{number:04b}"[::-1], 2) for number in range(16)]
    vectors = rotation[:, np.argsort(order)] @ sylvester(16)
    diagonal = vectors.T @ expected @ vectors
    eigenvalues = np.linalg.eigvalsh(expected)[::-1]
    np.testing.assert_allclose(diagonal, np.diag(eigenvalues), atol=1e-5 * eigenvalues[0])


def test_a_rotation_is_the_same_whatever_sign_the_solver_picks(monkeypatch):
    covariance = Covariance()
    covariance.add(torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0)))
    expected = covariance.rotation()
    solve = torch.linalg.eigh

    def flipped(matrix):
        values, vectors = solve(matrix)
        return values, vectors * torch.tensor([1.0, -1.0] * 4)

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    assert torch.equal(covariance.rotation(), expected)


def test_values_weigh_as_much_as_their_keys_are_asked_for():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 5, 8, generator=generator)
    queries = torch.randn(6, 7, 8, generator=generator)
    weights = value_weights(keys, queries)
    for head in range(2):
        scores = [
            sum(
                float(q @ keys[head, t]) ** 2
                for own in queries[3 * head : 3 * head + 3]
                for q in own
            )
            for t in range(5)
        ]
        np.testing.assert_allclose(weights[head], np.array(scores) / np.mean(scores), rtol=1e-5)


def test_rotated_energy_is_even_over_the_channels(model, documents):
    """In the eigenbasis all channels differ; behind the Hadamard matrix all hold the mean."""
    plan = build_method("oscar", sink_tokens=0).calibrate(model, documents)
    matrix = plan.layers[1].groups[0].key.matrix.tensor[0].double()
    energy = torch.zeros(32, dtype=torch.float64)
    for seen in observe(model, documents, with_gradients=False, with_queries=True):
        queries = seen[1, "key"].queries[0].double()
        energy += (queries @ matrix).square().sum((0, 1))
    torch.testing.assert_close(energy, energy.mean().expand(32), rtol=1e-5, atol=0)


def test_every_layer_and_side_gets_a_rotation(model, documents, tmp_path):
    method = build_method("oscar", sink_tokens=4)
    plan = method.calibrate(model, documents)
    assert set(plan.arrays) == {
        f"layers.{index}.{side}.rotation" for index in range(4) for side in ("key", "value")
    }
    codec = plan.layers[2].groups[0].value
    assert isinstance(codec, MatrixRotated)
    assert codec.inner.clip_ratio == 0.92
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    assert method.calibrate(model, documents) == plan


def test_bits_are_those_of_the_paper():
    """2 bits and two fp16 numbers for a head of 128 channels, however much is fitted."""
    plan = build_method("oscar").plan(tiny_model("llama", head_dim=128).config)
    assert plan.effective_bits == 2.25
    assert isinstance(plan.layers[0].groups[0].key, Rotated)  # until data say more


def test_text_shorter_than_the_sinks_is_refused(model, documents):
    with pytest.raises(CalibrationError, match="a document of more than 64 tokens, the sinks"):
        build_method("oscar").calibrate(model, documents[2:])


def test_heads_without_a_hadamard_matrix_are_refused(documents):
    model = tiny_model("llama", head_dim=48)
    with pytest.raises(PlanError, match="power of two to be rotated"):
        build_method("oscar").calibrate(model, documents)


def test_layers_that_cannot_be_packed_stay_as_they_are(documents):
    plan = build_method("oscar").calibrate(tiny_model("gemma3"), documents)
    assert [layer.is_exact for layer in plan.layers] == [True, False, True, False]


def test_keys_that_attention_sees_otherwise_are_refused(documents):
    """Latent attention caches 32 channels and attends to 48."""
    with pytest.raises(UnsupportedModelError, match="of 32 channels, got queries of 48 channels"):
        build_method("oscar").calibrate(tiny_model("deepseek_v2"), documents)
