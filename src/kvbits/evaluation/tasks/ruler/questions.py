"""Questions on invented people, whose documents lie among those of many others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kvbits.evaluation.tasks.base import Split, draw
from kvbits.evaluation.tasks.names import NAMES, PLACES
from kvbits.evaluation.tasks.ruler.base import Drawn, RulerTask
from kvbits.evaluation.tasks.ruler.prose import endless_words

_VALUE_LISTS = {
    "job": (
        "baker, surgeon, painter, lawyer, sailor, teacher, printer, miller, pilot, singer, "
        "gardener, chemist, tailor, judge, farmer, clockmaker, translator, mechanic, sculptor, "
        "librarian"
    ),
    "pastime": (
        "chess, rowing, fencing, sewing, fishing, astronomy, pottery, climbing, poetry, archery, "
        "swimming, photography, gardening, juggling, carving"
    ),
}
_VALUES: dict[str, Sequence[str]] = {
    "city": PLACES,
    **{name: text.split(", ") for name, text in _VALUE_LISTS.items()},
}
# attribute: (sentence of the document, question); {0} is the person, {1} the value
_ATTRIBUTES = {
    "city": ("{0} was born in {1}.", "In which city was {0} born?"),
    "job": ("{0} worked as a {1} for many years.", "What did {0} work as?"),
    "pastime": ("In the evenings {0} was fond of {1}.", "What was {0} fond of in the evenings?"),
}
_FOUNDED = "The company {1} was founded by {0}."
_HOP = "In which city was the founder of the company {1} born?"
_INTRO = (
    "Answer the question by the documents below. Give only the answer, a word or two.\n\n{0}\n\n"
    "Answer the question by the documents above. Give only the answer, a word or two.\n\n"
    "Question: {1} Answer:"
)


@dataclass(frozen=True, kw_only=True)
class Questions(RulerTask):
    """Answer a question on one person among many; all of them are invented.

    Args:
        hops: 1 asks for what one document says of a person; 2 for the birthplace of a company's
            founder, whom another document names.
    """

    max_new_tokens: ClassVar[int] = 32
    stop: ClassVar[str] = "\n"
    needs_all: ClassVar[bool] = False
    name: str = "qa_1"
    hops: Literal[1, 2] = 1

    def draw(self, seed: str, split: Split, size: int) -> Drawn:
        """Draw the person asked for and ``size`` others."""
        rng = random.Random(seed)
        surnames = endless_words(random.Random(f"{seed}/surnames"))
        attribute = "city" if self.hops == 2 else rng.choice(list(_ATTRIBUTES))
        answer = draw(lambda: (next(surnames), rng.choice(_VALUES[attribute])), split)
        person = f"{rng.choice(NAMES)} {answer[0].capitalize()}"
        company = f"{next(surnames).capitalize()} {next(surnames).capitalize()}"
        others = random.Random(f"{seed}/others")
        documents = []
        for _ in range(size):
            name = f"{others.choice(NAMES)} {next(surnames).capitalize()}"
            documents += self._documents(others, name, {})
        own = self._documents(rng, person, {attribute: answer[1]}, company)
        for document in own:
            documents.insert(round(rng.random() * len(documents)), document)
        text = "\n\n".join(
            f"Document {i}:\n{document}" for i, document in enumerate(documents, start=1)
        )
        question = _HOP if self.hops == 2 else _ATTRIBUTES[attribute][1]
        return Drawn(_INTRO.format(text, question.format(person, company)), (answer[1],))

    def _documents(
        self,
        rng: random.Random,
        person: str,
        fixed: dict[str, str],
        company: str | None = None,
    ) -> list[str]:
        """What is written of a person, in one document, or of their company in one more."""
        facts = [
            sentence.format(person, fixed.get(name) or rng.choice(_VALUES[name]))
            for name, (sentence, _) in _ATTRIBUTES.items()
        ]
        rng.shuffle(facts)
        if self.hops == 1:
            return [" ".join(facts)]
        named = company or f"{rng.choice(NAMES)} and Sons of {rng.choice(PLACES)}"
        return [" ".join(facts), _FOUNDED.format(person, named)]
