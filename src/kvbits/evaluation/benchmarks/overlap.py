"""How much two texts have in common: token F1, ROUGE-L, edit similarity.

As LongBench counts them. Chinese is cut into words by jieba (the extra ``zh``), as there.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

from kvbits.errors import MissingLibraryError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_CHINESE_PUNCTUATION = _PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙"
    "〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def normalized_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles, as SQuAD compares them.

    >>> normalized_words("The U.S., a country")
    ['us', 'country']
    """
    text = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return _ARTICLES.sub(" ", text).split()


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, each as often as it occurs.

    >>> round(token_f1(["in", "paris"], ["paris"]), 4)
    0.6667
    """
    common = sum((Counter(answer) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def english_f1(answer: str, reference: str) -> float:
    """Token F1 of normalized English words."""
    return token_f1(normalized_words(answer), normalized_words(reference))


def chinese_f1(answer: str, reference: str) -> float:
    """Token F1 of Chinese words without punctuation."""
    return token_f1(_chinese_words(answer), _chinese_words(reference))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L at summary level, as the package rouge 1.0.1 counts it for LongBench.

    Sentences end at full stops, and words are counted once each: with U the words of the longest
    common subsequences of all pairs of sentences, precision is \\|U\\| over the answer's different
    words, recall over the reference's.

    Differs: where that package runs out of recursion, on sentences of about a thousand words,
    LongBench counts 0.
    """
    answers, references = _sentences(answer), _sentences(reference)
    if not answers or not references:
        return 0.0
    union = {
        word for one in references for other in answers for word in _common_subsequence(one, other)
    }
    precision = len(union) / len({word for sentence in answers for word in sentence})
    recall = len(union) / len({word for sentence in references for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def chinese_rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L of Chinese words."""
    return rouge_l(" ".join(_cut(answer)), " ".join(_cut(reference)))


def edit_similarity(answer: str, reference: str) -> float:
    """Share of characters that match, in hundredths: ``fuzz.ratio`` of fuzzywuzzy.

    >>> edit_similarity("return x", "return y"), edit_similarity("", "return y")
    (0.88, 0.0)
    """
    if not answer or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, answer, reference).ratio()) / 100


def _sentences(text: str) -> list[list[str]]:
    """Words of every sentence; one of spaces alone has one empty word, as in that package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_subsequence(a: list[str], b: list[str]) -> list[str]:
    """A longest common subsequence; among equals the one that leaves out the end of ``b``."""
    rows = [[0] * (len(b) + 1)]
    for word in a:
        above, row = rows[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _chinese_words(text: str) -> list[str]:
    words = (
        "".join(char for char in word.lower() if char not in _CHINESE_PUNCTUATION)
        for word in _cut(text)
    )
    return [joined for word in words if (joined := "".join(word.split()))]


def _cut(text: str) -> list[str]:
    try:
        import jieba
    except ImportError:
        raise MissingLibraryError(
            "jieba must be installed to score Chinese answers; pip install 'kvbits[zh]'"
        ) from None
    jieba.setLogLevel("ERROR")
    return list(jieba.cut(text, cut_all=False))
