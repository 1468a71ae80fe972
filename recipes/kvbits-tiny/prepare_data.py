"""Turn training text and generated tasks into token files.

    python prepare_data.py --data DIR --tokenizer DIR --out DIR

Writes ``KIND.bin`` (uint16 tokens) and ``KIND.lengths.npy`` (tokens of each document) for three
kinds: ``text``, ``recall`` and ``arithmetic``. Every document begins with ``<|endoftext|>``. The
vocabulary needs 12 bits, so bit 15 marks the tokens that are read but not scored: in generated
documents only the answers count, because the keys, values and numbers of a problem cannot be
predicted and would only add noise to the gradient.
"""

from __future__ import annotations

import argparse
import lzma
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kvbits.evaluation.tasks import (
    ArithmeticChain,
    CopyList,
    Document,
    FactRecall,
    KeyValueRecall,
    LineRecall,
    Passkey,
    VariableTracking,
)

END = "<|endoftext|>"
NOT_SCORED = 0x8000
DOCUMENTS_PER_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Job:
    """One worker's share: a shard of text, or a number of generated tokens."""

    kind: str
    index: int
    shard: Path
    tokenizer: Path
    context: int
    num_tokens: int
    seed: int


def text_documents(job: Job) -> Iterator[str]:
    """Yield the documents of a shard; a shard is about 50 MB of text."""
    with lzma.open(job.shard, "rt", encoding="utf-8") as file:
        text = file.read(job.num_tokens * 4)
    for document in text.split(END):
        if document.strip():
            yield document.strip("\n") + "\n"


def recall_document(rng: random.Random, context: int, filler: str) -> Document:
    """Draw a recall document of any kind, log-uniform from 150 tokens to the context."""
    kind = rng.choices(
        ("kv", "lines", "passkey", "facts", "copy", "variables"), (8, 4, 4, 4, 2, 2)
    )[0]
    length = int(150 * (0.93 * context / 150) ** rng.random())
    prose = filler if rng.random() < 0.6 else None
    if kind == "kv":
        # A third of the objects have 30 to 60 entries: the size that the evaluation asks for.
        entries = rng.randint(30, 60) if rng.random() < 1 / 3 else max(3, length // 16)
        return KeyValueRecall(num_pairs=entries).document(rng, "train", rng.randint(6, 24))
    if kind == "lines":
        return LineRecall(num_lines=max(3, length // 22)).document(
            rng, "train", rng.randint(6, 24)
        )
    if kind == "passkey":
        return Passkey(length=length, filler=prose).document(rng, "train")
    if kind == "facts":
        people = rng.randint(3, min(20, 3 + length // 80))
        return FactRecall(length=length, num_facts=people, filler=prose).document(rng, "train", 12)
    if kind == "copy":
        items = rng.randint(4, max(5, min(60, length // 8)))
        return CopyList(length=length, num_words=items, filler=prose).document(rng, "train")
    hops = rng.randint(1, 3)
    return VariableTracking(length=length, hops=hops, filler=prose).document(rng, "train")


def generated(job: Job) -> Callable[[], Document]:
    """Return a function that draws the next generated document of the job."""
    rng = random.Random(f"prepare/{job.kind}/{job.seed}/{job.index}")
    if job.kind == "arithmetic":
        task = ArithmeticChain()
        return lambda: task.document(rng, "train")
    with lzma.open(job.shard, "rt", encoding="utf-8") as file:
        filler = file.read(6_000_000)
    return lambda: recall_document(rng, job.context, filler)


def encode_text(job: Job) -> Iterator[np.ndarray]:
    """Yield text documents as tokens, cut into pieces that fit the context."""
    tokenizer = Tokenizer.from_file(str(job.tokenizer))
    documents = list(text_documents(job))
    for start in range(0, len(documents), DOCUMENTS_PER_BATCH):
        batch = documents[start : start + DOCUMENTS_PER_BATCH]
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            ids = np.array(encoding.ids, dtype=np.uint16)
            for cut in range(0, len(ids), job.context - 1):
                yield np.concatenate([[0], ids[cut : cut + job.context - 1]]).astype(np.uint16)


def encode_generated(job: Job) -> Iterator[np.ndarray]:
    """Yield generated documents as tokens; all but the answers is marked as not scored."""
    tokenizer = Tokenizer.from_file(str(job.tokenizer))
    next_document = generated(job)
    made = 0
    while made < job.num_tokens:
        documents = [next_document() for _ in range(DOCUMENTS_PER_BATCH)]
        parts: list[str] = []
        for document in documents:
            lead = document.context
            for question, answer in document.turns:
                parts += [lead + question, answer]
                lead = "\n"
        encoded = iter(tokenizer.encode_batch(parts, add_special_tokens=False))
        for document in documents:
            pieces = [np.zeros(1, dtype=np.uint16)]
            for _ in document.turns:
                pieces.append(np.array(next(encoded).ids, dtype=np.uint16) | NOT_SCORED)
                pieces.append(np.array(next(encoded).ids, dtype=np.uint16))
            tokens = np.concatenate(pieces)
            if len(tokens) <= job.context:
                made += len(tokens)
                yield tokens


def run(job: Job) -> tuple[str, np.ndarray, np.ndarray]:
    """Do one job: the tokens of its documents in a row, and their lengths."""
    documents = list((encode_text if job.kind == "text" else encode_generated)(job))
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    return job.kind, np.concatenate(documents), lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.txt.xz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=4096, help="longest document, in tokens")
    parser.add_argument("--text-tokens", type=int, default=14_000_000, help="per shard, about")
    parser.add_argument("--recall-tokens", type=int, default=96_000_000)
    parser.add_argument("--arithmetic-tokens", type=int, default=64_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=16)
    args = parser.parse_args()
    start = time.perf_counter()
    shards = sorted(args.data.glob("train-*.txt.xz"))
    if not shards:
        parser.error(f"--data must hold train-*.txt.xz files, got {args.data}")
    shares = {
        "text": (len(shards), args.text_tokens),
        "recall": (args.workers, args.recall_tokens // args.workers),
        "arithmetic": (args.workers, args.arithmetic_tokens // args.workers),
    }
    jobs = [
        Job(
            kind=kind,
            index=index,
            shard=shards[index % len(shards)],
            tokenizer=args.tokenizer / "tokenizer.json",
            context=args.context,
            num_tokens=num_tokens,
            seed=args.seed,
        )
        for kind, (count, num_tokens) in shares.items()
        for index in range(count)
        if num_tokens > 0
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers) as pool:
        results = list(pool.map(run, jobs))
    for kind in shares:
        mine = [result for result in results if result[0] == kind]
        if not mine:
            continue
        np.concatenate([tokens for _, tokens, _ in mine]).tofile(args.out / f"{kind}.bin")
        lengths = np.concatenate([lengths for _, _, lengths in mine])
        np.save(args.out / f"{kind}.lengths.npy", lengths)
        scored = sum(int((tokens < NOT_SCORED).sum()) for _, tokens, _ in mine)
        print(f"{kind}: {len(lengths)} documents, {lengths.sum()} tokens, {scored} scored")
    print(f"prepared in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
