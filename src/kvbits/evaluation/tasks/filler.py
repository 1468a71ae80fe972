"""Plain prose to hide things in, made from our own templates: nothing third-party is bundled."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

_SLOT_LISTS: dict[str, str] = {
    "who": (
        "the baker, the old sailor, a young teacher, the gardener, her brother, the night "
        "watchman, a tired clerk, the village doctor, my neighbour, a travelling merchant, the "
        "miller, his aunt, the ferryman, a quiet student, the innkeeper, the painter, an elderly "
        "judge, the shepherd, the station master, a carpenter"
    ),
    "adj": (
        "old, quiet, narrow, green, heavy, broken, distant, warm, empty, bright, small, dusty, "
        "gentle, curious, wooden, pale, rough, simple, strange, wide, cold, crowded, faded, "
        "hollow"
    ),
    "thing": (
        "lamp, letter, basket, ladder, blanket, map, kettle, window, clock, bicycle, coat, bell, "
        "mirror, table, boat, lantern, notebook, wheel, door, barrel, candle, fence, hammer, "
        "chair, pipe, ribbon"
    ),
    "place": (
        "the harbour, the market, the orchard, the river, the church, the mill, the bridge, the "
        "station, the hill, the garden, the square, the forest, the library, the kitchen, the "
        "courtyard, the valley, the workshop, the school, the lake, the barn"
    ),
    "time": (
        "in the morning, after supper, before dawn, on market days, late in autumn, at noon, "
        "during the winter, every spring, when the rain stopped, toward evening, on a Sunday, "
        "long after midnight, in those years, at the end of the week"
    ),
    "verb": (
        "carried, repaired, sold, painted, forgot, found, borrowed, hid, cleaned, admired, "
        "dropped, lifted, examined, bought, moved, lost, polished, described"
    ),
    "weather": (
        "the wind was mild, it had rained for days, the sky was clear, a thin fog lay on the "
        "fields, snow was falling, the sun was low, the air smelled of smoke, thunder rolled far "
        "away, the frost had melted"
    ),
    "feel": (
        "nobody seemed to mind, everyone agreed, few people noticed, it hardly mattered, there "
        "was nothing more to say, the matter was soon forgotten, the whole street talked about "
        "it, no one asked why"
    ),
}
_SLOTS = {slot: options.split(", ") for slot, options in _SLOT_LISTS.items()}

_TEMPLATES: tuple[str, ...] = (
    "{who} {verb} the {adj} {thing} near {place} {time}.",
    "{time}, {who} walked slowly to {place} with a {adj} {thing}.",
    "{weather}, and {who} {verb} a {thing} beside {place}.",
    "there was a {adj} {thing} in {place}, and {feel}.",
    "{who} {verb} the {thing}, but {feel}.",
    "between {place} and {place} stood a {adj} {thing}.",
    "{time} {weather}, so {who} stayed close to {place}.",
    "some said that {who} {verb} every {thing} in {place}.",
    "the {thing} was {adj}, the {thing} was {adj}, and {feel}.",
    "{who} and {who} met at {place} {time}.",
    "from {place} one could see a {adj} {thing} and, beyond it, {place}.",
    "if {weather}, {who} would bring the {thing} to {place}.",
    "nothing about the {adj} {thing} surprised {who}.",
    "{who} had never {verb} such a {adj} {thing} before.",
    "{weather} {time}, yet {place} looked {adj} and {adj}.",
    "as usual, {who} waited at {place} until {feel}.",
)
_SLOT = re.compile(r"\{(\w+)\}")


def sentence(rng: random.Random) -> str:
    """Return one random sentence, capitalised and with a full stop."""
    text = _SLOT.sub(lambda match: rng.choice(_SLOTS[match[1]]), rng.choice(_TEMPLATES))
    return text[0].upper() + text[1:]


def sentences(
    rng: random.Random,
    num_tokens: float,
    count_tokens: Callable[[str], int],
    source: str | None = None,
) -> list[str]:
    """Return whole sentences of about ``num_tokens`` tokens together.

    Args:
        rng: the random state.
        num_tokens: the length wanted; zero or less gives an empty list.
        count_tokens: counts the tokens of a text.
        source: text to take consecutive sentences from, starting anywhere; generated if None.
    """
    found: list[str] = []
    rest = iter(_excerpt(rng, source, num_tokens)) if source else None
    while num_tokens > 0:
        text = next(rest, None) if rest else sentence(rng)
        if text is None:
            break
        found.append(text)
        num_tokens -= count_tokens(" " + text)
    return found


def _excerpt(rng: random.Random, source: str, num_tokens: float) -> list[str]:
    num_chars = int(num_tokens * 6) + 2000  # 6 characters a token is more than English text needs
    start = rng.randrange(max(1, len(source) - num_chars))
    text = source[start : start + num_chars].replace("<|endoftext|>", " ")
    text = re.sub(r"\s+", " ", text[text.find(". ") + 2 :])
    return re.split(r"(?<=[.!?]) ", text)
