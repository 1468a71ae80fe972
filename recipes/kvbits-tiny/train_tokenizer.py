"""Train the byte-level BPE tokenizer of kvbits-tiny: 4096 tokens, every digit a token of its own.

    python train_tokenizer.py --data DIR --out DIR

Single digits make arithmetic learnable for a small model and make a damaged cache visible: one
wrong digit is one wrong token. ``<|endoftext|>`` (id 0) begins and separates documents, and the
tokenizer puts it in front of every text, so that prompts look like training documents without the
caller having to know.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvbits.evaluation.tasks import ArithmeticChain, KeyValueRecall, Passkey

END = "<|endoftext|>"
PAD = "<|pad|>"
# As GPT-4's pattern, but \p{N} takes one digit at a time.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def training_text(data: Path, megabytes: float) -> Iterator[str]:
    """Yield natural text from every shard, then a tenth as much generated text."""
    shards = sorted(data.glob("train-*.txt.xz"))
    if not shards:
        raise SystemExit(f"--data must hold train-*.txt.xz files, got {data}")
    for shard in shards:
        with lzma.open(shard, "rt", encoding="utf-8") as file:
            text = file.read(int(megabytes * 1e6 / len(shards)))
        yield from (document.strip("\n") for document in text.split(END))
    budget = megabytes * 1e5
    for seed in range(10_000):
        for task in (ArithmeticChain(), KeyValueRecall(), Passkey(length=512)):
            for example in task.generate(20, seed=seed, split="train"):
                yield example.prompt + example.completion
                budget -= len(example.prompt)
        if budget < 0:
            return


def train(data: Path, megabytes: float, vocab_size: int) -> Tokenizer:
    """Train the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(data, megabytes), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 0)]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--megabytes", type=float, default=24, help="natural text to read")
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.data, args.megabytes, args.vocab_size).save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
