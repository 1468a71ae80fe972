"""Sample natural text from kvbits-tiny, for calibration and for held-out KL.

    python sample_text.py --model models/kvbits-tiny --seed 1 --out selfsample_calibration.jsonl
    python sample_text.py --model models/kvbits-tiny --seed 2 --out selfsample_heldout.jsonl

No third-party text may be bundled, and text sampled from the model itself is, by definition, what
the model finds likely. Documents are sampled from the bare ``<|endoftext|>`` in float32 on the
CPU; the same seed, torch version and number of documents give the same file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--n", type=int, default=64, help="documents")
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--min-tokens", type=int, default=64, help="shorter ones are not let end")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.95)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    torch.manual_seed(args.seed)
    start = torch.full((args.n, 1), tokenizer.bos_token_id)
    output = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=args.max_tokens,
        min_new_tokens=args.min_tokens,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=0,
    )
    texts = tokenizer.batch_decode(output[:, 1:], skip_special_tokens=True)
    with args.out.open("w", encoding="utf-8") as file:
        for text in texts:
            row = {"text": text, "seed": args.seed, "temperature": args.temperature}
            file.write(json.dumps({**row, "top_p": args.top_p}, ensure_ascii=False) + "\n")
    print(f"{len(texts)} documents, {sum(map(len, texts))} characters")


if __name__ == "__main__":
    main()
