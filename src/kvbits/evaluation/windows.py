"""Texts as windows of tokens, counted as the papers on cache quantization count perplexity.

KVQuant (arXiv 2401.18079) and the papers it follows join all texts of a set, tokenize them once,
cut the tokens into windows that do not overlap, leave out what is left at the end, and take
exp(sum of w * m_i / (n * w)), where m_i is the mean loss over the w - 1 predictions of window i.
All windows count alike, so that is exp of the mean over all predictions. The first token of a
window is never predicted, and no window sees the one before it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from kvbits.errors import CalibrationError
from kvbits.evaluation.token_set import Segment


def joined_ids(tokenizer: Any, texts: Sequence[str], joiner: str = "\n\n") -> list[int]:
    """Token ids of all texts as one, with the special tokens that the tokenizer adds to a text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts; empty ones count, as the joiner stands before and after them.
        joiner: what stands between them.
    """
    return list(tokenizer(joiner.join(texts))["input_ids"])


def sampled_ids(
    tokenizer: Any, texts: Sequence[str], window: int, *, count: int = 256, seed: int = 0
) -> list[int]:
    """Token ids of ``count`` windows, each from a random place of a random text that is as long.

    Texts are drawn with replacement, until one has ``window`` tokens; then comes the place in it.
    The draws are those of Python's generator after ``random.seed(seed)``, as in KVQuant's code.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts, of C4 the first shard of the validation split, in its order.
        window: tokens of a window.
        count: number of windows.
        seed: seed of the draws.

    Raises:
        CalibrationError: fewer texts are long enough in 1000 draws a window.
    """
    rng, found = random.Random(seed), 0
    ids: list[int] = []
    for _ in range(1000 * count):
        drawn = list(tokenizer(texts[rng.randint(0, len(texts) - 1)])["input_ids"])
        if len(drawn) < window:
            continue
        last = len(drawn) - window - 1
        start = rng.randint(0, last) if last > 0 else 0
        ids += drawn[start : start + window]
        found += 1
        if found == count:
            return ids
    raise CalibrationError(
        f"texts must hold documents of at least {window} tokens, got {found} in {1000 * count} "
        "draws; give longer texts or a shorter window"
    )


def cut_windows(
    ids: Sequence[int], window: int, stride: int | None = None
) -> list[tuple[Segment, ...]]:
    """Cut tokens into whole windows; what does not fill one is left out.

    Args:
        ids: the tokens.
        window: tokens of a window.
        stride: tokens from one window to the next, a whole window if None. With fewer, every
            token counts once: a window's first ``window - stride`` tokens only give context.

    Raises:
        ValueError: the stride is not within a window.
        CalibrationError: there is no whole window.
    """
    step = window if stride is None else stride
    if window < 2 or not 1 <= step <= window:
        raise ValueError(
            f"window must be at least 2 and stride between 1 and window, got {window} and {step}"
        )
    starts = range(0, len(ids) - window + 1, step)
    if not starts:
        raise CalibrationError(f"text must have at least {window} tokens, got {len(ids)}")
    made: list[tuple[Segment, ...]] = []
    for start in starts:
        context = 1 if start == 0 or step == window else window - step
        tokens = list(ids[start : start + window])
        made.append((Segment(tokens[:context], False), Segment(tokens[context:], True)))
    return made
