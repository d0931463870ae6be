"""Parts of a module replaced while one call runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from flash_inference.engine.adapt.parts import Place

Handler = Callable[[Place, tuple[Any, ...], dict[str, Any]], Any]

# A function that a module looks up belongs to the whole process, so one swap happens at a time.
SWAPPING = threading.RLock()


@contextmanager
def swapped(places: Sequence[Place], handler: Handler) -> Generator[None]:
    """While open, a call of any of the places on this thread goes to handler(place, args, kwargs).

    Other threads reach the originals, which are back in their places afterwards, whatever was raised.
    """
    thread = threading.get_ident()

    def call(place: Place, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return place.own(*args, **kwargs)
        return handler(place, args, kwargs)

    before: list[tuple[dict[str, Any], str, bool, Any]] = []
    with SWAPPING:
        try:
            for place in places:
                names = place.owner.__dict__
                before.append((names, place.attribute, place.attribute in names, names.get(place.attribute)))
                names[place.attribute] = partial(call, place)
            yield
        finally:
            for names, attribute, had, value in reversed(before):
                if had:
                    names[attribute] = value
                else:
                    del names[attribute]
