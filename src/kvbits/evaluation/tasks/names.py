"""People and places of the generated tasks."""

from __future__ import annotations

_NAMES = """
Alice Ben Clara Daniel Emma Frank Grace Henry Irene Jack Kate Liam Maria Nathan Olivia Peter
Quinn Rosa Samuel Tara Ulrich Vera Walter Xenia Yusuf Zoe Adam Bella Carl Diana Edward Fiona
George Hannah Ivan Julia Kevin Laura Martin Nora Oscar Paula Robert Sarah Thomas Ursula Victor
Wendy
"""
_PLACES = """
London Paris Madrid Rome Berlin Vienna Lisbon Dublin Oslo Cairo Tokyo Delhi Lima Quito Boston
Denver Austin Seattle Geneva Prague Athens Warsaw Budapest Helsinki Toronto Sydney Nairobi Havana
Kyoto Venice
"""

NAMES: tuple[str, ...] = tuple(_NAMES.split())
PLACES: tuple[str, ...] = tuple(_PLACES.split())
