"""The bundled model loads stock, and the recipe's own parts do what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "kvbits-tiny"


def recipe(name: str) -> ModuleType:
    """Import a script of the recipe by path; the recipes are not a package."""
    path = ROOT / "recipes" / "kvbits-tiny" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"kvbits_tiny_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return recipe("train")


def test_the_training_model_is_transformers_qwen2(train: ModuleType, tmp_path: Path) -> None:
    """Same weights, same loss as stock Qwen2ForCausalLM: otherwise the export is another model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = train.ModelConfig(num_hidden_layers=2)
    model = train.Qwen2(config, 64).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    train.export(model, config, MODEL, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 4096, (2, 65))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(tokens[:, :-1], tokens[:, 1:]).item() / 128
    with torch.no_grad():
        theirs = stock(tokens[:, :-1]).logits.flatten(0, 1)
        theirs = torch.nn.functional.cross_entropy(theirs, tokens[:, 1:].flatten()).item()
    assert ours == pytest.approx(theirs, abs=0.02)  # bfloat16 against float32


def test_orthogonalize_brings_singular_values_near_one(train: ModuleType) -> None:
    """Five steps of this quintic leave them in about 0.7 to 1.2."""
    torch.manual_seed(0)
    for shape in ((2, 64, 64), (2, 96, 32), (2, 32, 96)):
        values = torch.linalg.svdvals(train.orthogonalize(torch.randn(shape)).float())
        assert values.max() < 1.4
        assert values.median() > 0.6


def test_rows_start_with_a_document_and_never_cut_generated_ones(
    train: ModuleType, tmp_path: Path
) -> None:
    """Recall documents end with token 9 here: a 7 that opens one needs its 9 in the same row."""
    rng = np.random.default_rng(0)
    for kind, body, close in (("text", 5, 5), ("recall", 7, 9), ("arithmetic", 6, 8)):
        documents = []
        for length in rng.integers(8, 60, size=200):
            document = np.full(length, body, dtype=np.uint16)
            document[0], document[-1] = 0, close
            documents.append(document)
        np.concatenate(documents).tofile(tmp_path / f"{kind}.bin")
        np.save(tmp_path / f"{kind}.lengths.npy", np.array([len(d) for d in documents]))
    source = train.rows(tmp_path, 64, seed=0)
    made = [next(source) for _ in range(200)]
    shares = np.bincount(np.concatenate(made), minlength=10)
    for row in made:
        assert len(row) == 65
        assert row[0] == 0
        starts = [*np.flatnonzero(row == 0), len(row)]
        for begin, end in pairwise(starts):
            document = row[begin:end]
            if document.max() > 5:
                assert document[-1] == {7: 9, 6: 8}[int(document[1])]
    assert shares[5] / shares.sum() == pytest.approx(0.45, abs=0.05)


def test_only_answers_of_generated_documents_are_scored(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    prepare = recipe("prepare_data")
    job = prepare.Job(
        kind="arithmetic",
        index=0,
        shard=tmp_path,
        tokenizer=MODEL / "tokenizer.json",
        context=512,
        num_tokens=1000,
        seed=0,
    )
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for tokens in list(prepare.encode_generated(job))[:20]:
        scored = tokenizer.decode(tokens[(tokens < prepare.NOT_SCORED) & (tokens > 0)].tolist())
        read = tokenizer.decode(
            (tokens[tokens >= prepare.NOT_SCORED] - prepare.NOT_SCORED).tolist()
        )
        assert read.startswith("Problem: ")
        assert scored.endswith(".")
        assert "The answer is" in scored


def test_the_bundled_model_solves_a_problem_with_the_stock_classes() -> None:
    """The shipped weights are the trained ones: they solve nearly all three-step problems."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvbits.evaluation.tasks import ArithmeticChain

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert tokenizer("Hi").input_ids[0] == tokenizer.eos_token_id == 0
    task = ArithmeticChain(min_steps=3, max_steps=3)
    examples = task.generate(8, seed=0, split="test")
    batch = tokenizer([e.prompt for e in examples], padding=True, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=90)[:, batch.input_ids.shape[1] :]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    assert sum(task.is_correct(t, e) for t, e in zip(texts, examples, strict=True)) >= 7


def test_the_bundled_model_has_the_size_and_shape_the_card_says() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["num_hidden_layers"] == 12
    assert config["num_key_value_heads"] == 2
    assert config["hidden_size"] // config["num_attention_heads"] == 64
    assert config["max_position_embeddings"] == 4096
    size = (MODEL / "model.safetensors").stat().st_size
    assert 30e6 < size < 36e6
