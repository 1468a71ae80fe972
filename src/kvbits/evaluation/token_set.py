"""Token sets: the documents a measurement runs on, and which of their tokens count.

A set is a plain pair of tensors with a checksum, so that a record can say exactly what was
measured. Documents are padded on the right: under causal attention nothing that counts can see
the padding, and no mask is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvbits.plan.provenance import Dataset


class Segment(NamedTuple):
    """A piece of a document: its tokens, and whether predicting them counts."""

    ids: list[int]
    is_counted: bool


class TokenSet(NamedTuple):
    """Documents of one domain as token ids.

    Attributes:
        name: short name for tables, for example ``selfsample_heldout``.
        domain: ``text``, ``reasoning``, ``recall`` or a name of the caller's.
        split: which part of the data this is, for example ``heldout``.
        input_ids: ``[N, T]`` int64, padded on the right.
        counted: ``[N, T]`` bool; True where the token is one whose prediction counts. The first
            token of a document is never predicted, so column 0 is False.
    """

    name: str
    domain: str
    split: str
    input_ids: torch.Tensor
    counted: torch.Tensor

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.input_ids.shape[0]

    @property
    def documents(self) -> list[torch.Tensor]:
        """Token ids of every document ``[T]``, up to the last that counts: without padding."""
        last = (self.counted * torch.arange(self.counted.shape[1])).amax(1)
        return [ids[: stop + 1] for ids, stop in zip(self.input_ids, last.tolist(), strict=True)]

    def first(self, count: int) -> TokenSet:
        """The set of its first documents."""
        return self._replace(input_ids=self.input_ids[:count], counted=self.counted[:count])

    @property
    def num_tokens(self) -> int:
        """Number of predictions that count."""
        return int(self.counted.sum())

    @property
    def checksum(self) -> str:
        """SHA-256 over the shape, the token ids and the counted positions, in hexadecimal."""
        digest = hashlib.sha256(str(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.to(torch.int64).cpu().contiguous().numpy().tobytes())
        digest.update(self.counted.to(torch.uint8).cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def encode_document(tokenizer: Any, text: str) -> list[int]:
    """Return a document's token ids, led by the BOS token where the tokenizer has one."""
    ids = list(tokenizer(text)["input_ids"])
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of text that follows other text: no special tokens are added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def merge_sets(sets: Sequence[TokenSet], *, name: str, domain: str) -> TokenSet:
    """Join sets of one split into one, padding to the longest."""
    width = max(item.input_ids.shape[1] for item in sets)

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        padded = [torch.nn.functional.pad(item, (0, width - item.shape[1])) for item in tensors]
        return torch.cat(padded)

    ids, counted = join([s.input_ids for s in sets]), join([s.counted for s in sets])
    return TokenSet(name, domain, sets[0].split, ids, counted)


def padded_set(
    tokenizer: Any, name: str, domain: str, split: str, documents: Sequence[Sequence[Segment]]
) -> TokenSet:
    """Pad documents into a set; the first token of a document never counts.

    Args:
        tokenizer: gives the padding token.
        name: name of the set.
        domain: its domain.
        split: its split.
        documents: each a sequence of segments, in order.
    """
    rows = [[token for segment in document for token in segment.ids] for document in documents]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0, dtype=torch.int64)
    counted = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (row, document) in enumerate(zip(rows, documents, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        flags = [segment.is_counted for segment in document for _ in segment.ids]
        counted[index, : len(row)] = torch.tensor(flags)
    counted[:, 0] = False
    return TokenSet(name, domain, split, ids, counted)


def dataset(token_set: TokenSet) -> Dataset:
    """Describe a token set for a plan file."""
    return Dataset(
        name=token_set.name,
        checksum=token_set.checksum,
        split=token_set.split,
        domain=token_set.domain,
        num_documents=token_set.num_documents,
        num_tokens=token_set.num_tokens,
    )
