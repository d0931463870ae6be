"""Colours for positions: one hue path, dark to light, readable on a light and on a dark ground."""

from __future__ import annotations

_ANCHORS = ((84, 70, 190), (48, 118, 206), (24, 152, 176), (74, 184, 120), (166, 206, 70), (246, 206, 70))
"""Lightness rises evenly from the first to the last, so that later reads as lighter without the hue."""


def colour(share: float) -> tuple[int, int, int]:
    """(red, green, blue) of 0 <= share <= 1, linear between the anchors."""
    place = min(max(share, 0.0), 1.0) * (len(_ANCHORS) - 1)
    left = min(int(place), len(_ANCHORS) - 2)
    rest = place - left
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(_ANCHORS[left], _ANCHORS[left + 1], strict=True))
    return red, green, blue


def hexadecimal(share: float) -> str:
    """The same as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour(share))
