"""Evaluate kvbits-tiny at full precision, measure its keys, and see what a coarser cache costs.

    python evaluate.py --model models/kvbits-tiny --out results/full_precision.jsonl [--data DIR]

Generated tasks (test split) and key statistics need nothing else. ``--data`` names a folder with
the evaluation files (wikitext-2, LAMBADA, BLiMP, held-out text), which are read and never
shipped. One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvbits.evaluation.tasks import (
    ArithmeticChain,
    CopyList,
    Example,
    FactRecall,
    KeyValueRecall,
    LineRecall,
    Passkey,
    Task,
    VariableTracking,
)

PASSKEY_LENGTHS = (512, 1024, 2048, 3000, 3500)
DEPTHS = tuple(i / 10 for i in range(11))
WIDTHS = ((16, 16), (8, 8), (4, 4), (4, 2), (3, 3), (2, 4), (2, 2))  # (key bits, value bits)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model under test with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    batch_tokens: int

    def ids(self, text: str) -> list[int]:
        """Tokens of ``text`` without the leading document separator."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Records:
    """Appends one JSON line per measurement and prints it."""

    def __init__(self, subject: Subject, out: Path) -> None:
        self.out, self.subject, self.clock = out, subject, time.perf_counter()
        device = subject.model.device
        self.versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "dtype": str(subject.model.dtype).removeprefix("torch."),
        }

    def add(
        self, measurement: str, value: float, error: float | None, n: int, **more: Any
    ) -> None:
        """Write one measurement; the seconds are those since the last one."""
        now = time.perf_counter()
        record = {"model": self.subject.name, "measurement": measurement, "value": round(value, 6)}
        record["standard_error"] = None if error is None else round(error, 6)
        record |= {
            "n": n,
            **more,
            "seconds": round(now - self.clock, 2),
            "versions": self.versions,
        }
        self.clock = now
        with self.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = {k: v for k, v in record.items() if k not in ("model", "versions", "sha256")}
        print(json.dumps(shown), flush=True)

    def add_rate(self, measurement: str, hits: list[bool], **more: Any) -> None:
        """Write a share of successes in percent with its binomial standard error."""
        rate = sum(hits) / len(hits)
        error = 100 * math.sqrt(rate * (1 - rate) / len(hits))
        self.add(measurement, 100 * rate, error, len(hits), unit="percent", **more)


# ---- likelihoods


@torch.no_grad()
def score(subject: Subject, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Score the last tokens of each sequence, given (tokens, number to score).

    Returns:
        for each, the summed log-likelihood in nats, and whether every scored token was the
        most likely one.
    """
    results: list[tuple[float, bool]] = [(0.0, False)] * len(sequences)
    for chunk in by_length(subject, [len(tokens) for tokens, _ in sequences]):
        longest = max(len(sequences[i][0]) for i in chunk)
        batch = torch.zeros(len(chunk), longest, dtype=torch.long)
        for row, i in enumerate(chunk):
            batch[row, : len(sequences[i][0])] = torch.tensor(sequences[i][0])
        # Padding on the right is never attended by the tokens before it, so no mask is needed.
        logits = subject.model(batch.to(subject.model.device), use_cache=False).logits
        for row, i in enumerate(chunk):
            tokens, scored = sequences[i]
            part = logits[row, len(tokens) - scored - 1 : len(tokens) - 1].float()
            wanted = torch.tensor(tokens[-scored:], device=part.device)
            picked = part.log_softmax(-1).gather(1, wanted[:, None]).sum()
            results[i] = (picked.item(), bool((part.argmax(-1) == wanted).all()))
    return results


def by_length(subject: Subject, lengths: list[int]) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, of about ``batch_tokens`` tokens each."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        size = max(1, subject.batch_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def perplexity(subject: Subject, records: Records, path: Path, split: str, limit: int) -> None:
    """Bits per byte and word perplexity, in windows of 4096 tokens that overlap by half."""
    text = path.read_text(encoding="utf-8")[: limit or None]
    ids, window, stride = subject.ids(text), 4096, 2048
    sequences, start = [], 0
    while start < len(ids):
        begin = max(0, start - (window - 1 - stride))
        stop = min(len(ids), start + stride)
        sequences.append(([0, *ids[begin:stop]], stop - start))
        start = stop
    losses = [-loss for loss, _ in score(subject, sequences)]
    num_bytes, num_words = len(text.encode()), len(text.split())
    # Standard error of the total from the spread of per-token losses between windows.
    means = torch.tensor([x / n for x, (_, n) in zip(losses, sequences, strict=True)])
    relative = (means.std() / math.sqrt(len(means)) / means.mean()).item() if len(means) > 1 else 0
    bits = sum(losses) / math.log(2) / num_bytes
    per_word = sum(losses) / num_words
    more = {"split": split, "file": path.name, "tokens": len(ids), "window": window}
    more |= {"stride": stride, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    records.add("bits_per_byte", bits, bits * relative, len(means), **more)
    word = math.exp(per_word)
    records.add("word_perplexity", word, word * per_word * relative, len(means), **more)


def lambada(subject: Subject, records: Records, path: Path, limit: int) -> None:
    """Share of passages whose last word is the greedy continuation."""
    rows = read_rows(path, limit)
    sequences = []
    for row in rows:
        target = subject.ids(" " + row["target"])
        sequences.append(([0, *subject.ids(row["context"]), *target], len(target)))
    hits = [is_greedy for _, is_greedy in score(subject, sequences)]
    records.add_rate("lambada_accuracy", hits, split="test", file=path.name, sha256=checksum(path))


def blimp(subject: Subject, records: Records, path: Path, limit: int) -> None:
    """Share of minimal pairs whose grammatical sentence is the likelier one."""
    rows = read_rows(path, limit)
    sequences = []
    for row in rows:
        for side in ("good", "bad"):
            ids = subject.ids(row[side])
            sequences.append(([0, *ids], len(ids)))
    scores = [loss for loss, _ in score(subject, sequences)]
    hits = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    records.add_rate("blimp_accuracy", hits, split="test", file=path.name, sha256=checksum(path))


def read_rows(path: Path, limit: int) -> list[dict[str, Any]]:
    """Read a JSON-lines file, or every k-th line of it so that about ``limit`` remain."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows[:: max(1, len(rows) // limit)] if limit else rows


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- generation


class SimulatedCache(DynamicCache):
    """A cache whose every token is rounded to a few bits per token and head as it enters.

    A simulation: nothing is packed. The range is asymmetric, from the least to the greatest
    channel of a head. Prefill reads rounded states too, unlike the deployed cache.
    """

    def __init__(self, key_bits: int, value_bits: int) -> None:
        super().__init__()
        self.bits = (key_bits, value_bits)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Round the new states, then store them."""
        keys, values = (
            round_states(key_states, self.bits[0]),
            round_states(value_states, self.bits[1]),
        )
        return super().update(keys, values, layer_idx, *args, **kwargs)


def round_states(states: Tensor, bits: int) -> Tensor:
    """Round ``[B, H_kv, T, D]`` to ``2**bits`` levels per token and head; 16 bits is a no-op."""
    if bits >= 16:
        return states
    low, high = states.float().aminmax(dim=-1, keepdim=True)
    scale = (high - low).clamp_min(1e-8) / (2**bits - 1)
    return (((states.float() - low) / scale).round() * scale + low).to(states.dtype)


@torch.no_grad()
def generate(
    subject: Subject,
    prompts: list[str],
    max_new_tokens: int,
    cache: Callable[[], Any] | None = None,
) -> list[str]:
    """Greedy completions, in batches of similar length, padded on the left."""
    results = [""] * len(prompts)
    encoded = [[0, *subject.ids(prompt)] for prompt in prompts]
    for chunk in by_length(subject, [len(ids) + max_new_tokens for ids in encoded]):
        longest = max(len(encoded[i]) for i in chunk)
        batch = torch.ones(len(chunk), longest, dtype=torch.long)
        mask = torch.zeros_like(batch)
        for row, i in enumerate(chunk):
            batch[row, longest - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, longest - len(encoded[i]) :] = 1
        device = subject.model.device
        output = subject.model.generate(
            batch.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            past_key_values=cache() if cache else None,
        )
        texts = subject.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        for i, text in zip(chunk, texts, strict=True):
            results[i] = text
    return results


def answers(
    subject: Subject, task: Task, examples: list[Example], cache: Callable[[], Any] | None = None
) -> list[bool]:
    """Whether each example is answered correctly."""
    prompts = [example.prompt for example in examples]
    texts = generate(subject, prompts, task.max_new_tokens, cache)
    return [task.is_correct(text, example) for text, example in zip(texts, examples, strict=True)]


def generated_tasks(subject: Subject, records: Records, n: int, seed: int) -> None:
    """Exact match on the test split of every generated task."""
    more = {"split": "test", "seed": seed}

    def count_tokens(text: str) -> int:
        return len(subject.ids(text))

    for templates in ("seen", "heldout"):
        for length in PASSKEY_LENGTHS:
            each = max(1, n // 50)
            examples = []
            for depth in DEPTHS:
                task = Passkey(
                    length=length, depth=depth, templates=templates, count_tokens=count_tokens
                )
                examples += task.generate(each, seed=seed, split="test")
            hits = answers(subject, task, examples)
            by_depth = {
                str(depth): 100 * sum(hits[i * each : (i + 1) * each]) / each
                for i, depth in enumerate(DEPTHS)
            }
            records.add_rate(
                "passkey", hits, length=length, templates=templates, by_depth=by_depth, **more
            )
    tasks: list[tuple[Task, dict[str, Any]]] = [
        (KeyValueRecall(num_pairs=pairs), {"num_pairs": pairs}) for pairs in (10, 40, 100)
    ]
    tasks += [
        (LineRecall(num_lines=40), {"num_lines": 40}),
        (FactRecall(length=1024, count_tokens=count_tokens), {"length": 1024}),
        (CopyList(length=1024, count_tokens=count_tokens), {"length": 1024}),
        (VariableTracking(length=1024, count_tokens=count_tokens), {"length": 1024, "hops": 2}),
        (ArithmeticChain(), {"templates": "seen"}),
        (ArithmeticChain(templates="heldout"), {"templates": "heldout"}),
    ]
    for task, settings in tasks:
        examples = task.generate(n, seed=seed, split="test")
        hits = answers(subject, task, examples)
        if task.name == "arithmetic":
            steps = [example.facts["num_steps"] for example in examples]
            settings["by_steps"] = {
                k: round(
                    100
                    * sum(h for h, s in zip(hits, steps, strict=True) if s == k)
                    / steps.count(k),
                    1,
                )
                for k in sorted(set(steps))
            }
        records.add_rate(task.name, hits, **settings, **more)


def recall_file(subject: Subject, records: Records, path: Path, limit: int) -> None:
    """Exact match on an outside file of recall prompts that fit the context, task by task."""
    rows = [row for row in read_rows(path, limit) if len(subject.ids(row["prompt"])) < 4000]
    texts = generate(subject, [row["prompt"] for row in rows], 24)
    for task in sorted({row["task"] for row in rows} - {"copy"}):
        hits = [
            text.strip(' "<').startswith(row["answer"].strip(' "<>.'))
            for text, row in zip(texts, rows, strict=True)
            if row["task"] == task
        ]
        records.add_rate(
            f"recall_file_{task}", hits, split="test", file=path.name, sha256=checksum(path)
        )


def headroom(subject: Subject, records: Records, n: int, seed: int) -> None:
    """What rounding the cache costs: exact match at several widths, simulated."""
    tasks: list[Task] = [ArithmeticChain(), KeyValueRecall(num_pairs=40), LineRecall(num_lines=40)]
    for task in tasks:
        examples = task.generate(n, seed=seed, split="test")
        for key_bits, value_bits in WIDTHS:
            hits = answers(
                subject, task, examples, lambda k=key_bits, v=value_bits: SimulatedCache(k, v)
            )
            records.add_rate(
                f"simulated_{task.name}",
                hits,
                split="test",
                seed=seed,
                key_bits=key_bits,
                value_bits=value_bits,
            )


# ---- keys


@torch.no_grad()
def key_statistics(subject: Subject, records: Records, texts: Iterable[str], source: str) -> None:
    """How uneven the key channels are, before and after rotary embedding, layer by layer.

    Kurtosis is that of the channels of one token and head, averaged (3 for a normal
    distribution). The ratio is the largest channel's absolute maximum over tokens divided by the
    median channel's, averaged over heads.
    """
    model = subject.model
    before: dict[int, list[Tensor]] = {}
    after: dict[int, list[Tensor]] = {}
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda _m, _i, out, index=index: before.setdefault(index, []).append(
                out.float().unflatten(-1, (-1, 64)).transpose(1, 2)[0].cpu()
            )
        )
        for index, layer in enumerate(model.model.layers)
    ]
    num_tokens = 0
    for text in texts:
        ids = [0, *subject.ids(text)][:2048]
        num_tokens += len(ids)
        cache = DynamicCache()
        model(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            after.setdefault(index, []).append(layer.keys[0].float().cpu())
    for hook in hooks:
        hook.remove()
    for place, states in (("pre_rope", before), ("post_rope", after)):
        for index in sorted(states):
            # The first tokens are sinks, unlike the rest; they are left out.
            keys = torch.cat([part[:, 4:] for part in states[index]], dim=1)  # [H_kv, T, D]
            centred = keys - keys.mean(-1, keepdim=True)
            kurtosis = (centred.pow(4).mean(-1) / centred.pow(2).mean(-1).square()).mean().item()
            peak = keys.abs().amax(1)  # [H_kv, D]
            ratio = (peak.amax(-1) / peak.median(-1).values).mean().item()
            more = {"layer": index, "place": place, "source": source}
            records.add("key_kurtosis", kurtosis, None, num_tokens, **more)
            records.add("key_max_over_median", ratio, None, num_tokens, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", default="kvbits-tiny")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--data", type=Path, help="folder with the evaluation files")
    parser.add_argument("--n", type=int, default=1000, help="examples of each generated task")
    parser.add_argument("--limit", type=int, default=0, help="rows of each file, 0 for all")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--batch-tokens", type=int, default=262_144)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--skip", nargs="*", default=[], help="tasks, text, headroom or keys")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    subject = Subject(
        name=args.name,
        model=model.to(device).eval(),
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        batch_tokens=args.batch_tokens,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = Records(subject, args.out)
    if args.data and "text" not in args.skip:
        characters = args.limit * 400
        for name in ("wikitext2_test.raw", "wikitext2_test_detok.txt"):
            perplexity(subject, records, args.data / name, "test", characters)
        for name in ("books", "wiki", "edu", "tech"):
            path = args.data / f"heldout_{name}_test.txt"
            perplexity(subject, records, path, "test", characters)
        lambada(subject, records, args.data / "lambada_test.jsonl", args.limit)
        blimp(subject, records, args.data / "blimp_100.jsonl", args.limit)
        recall_file(subject, records, args.data / "recall_test.jsonl", args.limit)
    if "tasks" not in args.skip:
        generated_tasks(subject, records, args.n, args.seed)
    if "headroom" not in args.skip:
        headroom(subject, records, max(10, args.n // 2), args.seed + 1)
    if "keys" not in args.skip:
        problems = ArithmeticChain().generate(64, seed=args.seed, split="valid")
        texts = [example.prompt + example.completion for example in problems]
        key_statistics(subject, records, texts, "arithmetic, valid split")
        if args.data:
            text = (args.data / "heldout_wiki_valid.txt").read_text(encoding="utf-8")
            pieces = [text[i : i + 9000] for i in range(0, 90_000, 9000)]
            key_statistics(subject, records, pieces, "heldout_wiki_valid.txt")


if __name__ == "__main__":
    main()
