"""Sentences of the arithmetic word problems: those seen in training, those held out of it."""

from __future__ import annotations

from typing import NamedTuple

_OBJECTS = """
apples marbles books stamps coins shells cards pencils buttons stickers oranges eggs candles
bottles cookies plums flowers stones feathers ribbons tickets tiles nails beads walnuts lemons
envelopes photos badges ropes cups plates lamps baskets bricks seeds pears keys spoons bells
"""

OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())
BOXES: tuple[str, ...] = (
    "boxes",
    "bags",
    "packs",
    "crates",
    "jars",
    "trays",
    "baskets",
    "chests",
)


class Sentences(NamedTuple):
    """Templates of one kind of statement."""

    seen: tuple[str, ...]
    heldout: tuple[str, ...]


# One person, one changing number. {a} is the person, {b} a friend, {n} and {m} are numbers.
LEDGER: dict[str, Sentences] = {
    "start": Sentences(
        (
            "{a} has {n} {objects}.",
            "At first {a} has {n} {objects}.",
            "{a} starts the day with {n} {objects}.",
            "There are {n} {objects} in the house of {a}.",
        ),
        ("{a} begins with {n} {objects} in a drawer.", "This morning {a} counted {n} {objects}."),
    ),
    "add": Sentences(
        (
            "{a} buys {n} more.",
            "{b} gives {a} {n} {objects}.",
            "{a} finds {n} more {objects}.",
            "Then {a} gets {n} {objects} from {b}.",
            "{n} more {objects} arrive for {a}.",
            "Later {a} wins {n} {objects}.",
        ),
        ("{b} hands over {n} {objects} to {a}.", "{a} receives another {n} as a present."),
    ),
    "subtract": Sentences(
        (
            "{a} loses {n} of them.",
            "{a} gives {n} {objects} to {b}.",
            "Then {a} sells {n} {objects}.",
            "{b} takes {n} {objects} away.",
            "{n} of the {objects} break.",
            "{a} throws {n} {objects} away.",
        ),
        ("{a} parts with {n} of the {objects}.", "Sadly, {n} {objects} get stolen."),
    ),
    "multiply": Sentences(
        (
            "After a week {a} has {n} times as many.",
            "Then the number of {objects} grows to {n} times what it was.",
            "{a} works hard and now has {n} times as many {objects}.",
            "With luck {a} makes it {n} times as many.",
        ),
        ("Soon the collection of {a} is {n} times as large.",),
    ),
    "divide": Sentences(
        (
            "{a} splits the {objects} into {n} equal parts and keeps one part.",
            "{a} shares them equally among {n} people, {a} included, and keeps one share.",
            "The {objects} are divided into {n} equal piles, and {a} keeps one pile.",
            "{a} keeps only one of {n} equal shares of the {objects}.",
        ),
        ("{a} deals the {objects} out evenly to {n} players and plays with one hand of them.",),
    ),
    "add_product": Sentences(
        (
            "{a} buys {n} {boxes} with {m} {objects} in each.",
            "{b} brings {a} {n} {boxes} of {m} {objects} each.",
            "Then {n} {boxes} arrive for {a}, each with {m} {objects}.",
            "{a} finds {n} {boxes} that hold {m} {objects} each.",
        ),
        ("An uncle sends {a} {n} {boxes}, every one filled with {m} {objects}.",),
    ),
    "subtract_product": Sentences(
        (
            "{a} gives {m} {objects} to each of {n} friends.",
            "{a} fills {n} {boxes} with {m} {objects} each and sells them.",
            "{n} visitors take {m} {objects} each.",
            "{a} loses {n} {boxes} with {m} {objects} in each.",
        ),
        ("For {n} days {a} uses up {m} {objects} every day.",),
    ),
    "ask": Sentences(
        (
            "How many {objects} does {a} have now?",
            "How many {objects} are left?",
            "How many {objects} does {a} have in the end?",
        ),
        ("What is the number of {objects} that {a} has at last?",),
    ),
}

# Several people, each number given by earlier ones. {a} is new, {b} and {c} are earlier people.
RELATIONS: dict[str, Sentences] = {
    "start": Sentences(
        (
            "{a} has {n} {objects}.",
            "{a} owns {n} {objects}.",
            "There are {n} {objects} on the table of {a}.",
        ),
        ("{n} {objects} belong to {a}.",),
    ),
    "add": Sentences(
        (
            "{a} has {n} more {objects} than {b}.",
            "{a} has {n} {objects} more than {b} has.",
            "{a} owns {n} more than {b}.",
        ),
        ("Compared with {b}, {a} has {n} extra {objects}.",),
    ),
    "subtract": Sentences(
        (
            "{a} has {n} fewer {objects} than {b}.",
            "{a} has {n} {objects} less than {b} has.",
            "{a} owns {n} fewer than {b}.",
        ),
        ("{a} would need {n} more {objects} to have as many as {b}.",),
    ),
    "multiply": Sentences(
        (
            "{a} has {n} times as many {objects} as {b}.",
            "{a} owns {n} times as many as {b}.",
            "For every one of the {objects} of {b}, {a} has {n}.",
        ),
        ("The {objects} of {a} are {n} times those of {b}.",),
    ),
    "divide": Sentences(
        (
            "{a} has one of {n} equal parts of what {b} has.",
            "{b} has {n} times as many {objects} as {a}.",
        ),
        ("Divide the {objects} of {b} by {n} and you get those of {a}.",),
    ),
    "sum": Sentences(
        (
            "{a} has as many {objects} as {b} and {c} together.",
            "{a} owns the same number of {objects} as {b} and {c} combined.",
        ),
        ("Put the {objects} of {b} and {c} together and you know how many {a} has.",),
    ),
    "ask": Sentences(
        ("How many {objects} does {a} have?", "What is the number of {objects} that {a} has?"),
        ("Tell me how many {objects} {a} has.",),
    ),
    "ask_sum": Sentences(
        (
            "How many {objects} do {b} and {c} have together?",
            "How many {objects} do {b} and {c} have in total?",
        ),
        ("Count the {objects} of {b} and {c}: how many are there?",),
    ),
}
