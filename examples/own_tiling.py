"""A tiling of your own, in powers of three: python examples/own_tiling.py"""

from __future__ import annotations

from dataclasses import dataclass

import flash_inference as fi
from flash_inference.testing import random_model
from flash_inference.tiling import Prompted, Rectangle, Span, cost, draw, fft_price, verify, verify_span
from flash_inference.tiling.triangle import Triangle


@dataclass(frozen=True, repr=False)
class Ternary(Triangle):
    """With U the largest power of 3 that divides the n known positions: what is known of the block of 3 U around n is
    paid to the next U positions.
    """

    block, reach = 1, property(lambda self: (self.length, self.length))

    def after(self, position: int) -> tuple[Rectangle, ...]:
        n, side = self.check(position) + 1, 1
        while n % (3 * side) == 0:
            side *= 3
        return self.rectangle((n - n % (3 * side), n), (n, n + side))

    def span(self, start: int, n: int) -> Span:
        stop = self.check_span(start, n)
        tiles = [tile for step in range(start, stop - 1) for tile in self.after(step)]
        before = [tile.clip(range(start), range(start, stop)) for tile in tiles]
        after = [tile.clip(range(stop), range(stop, self.length)) for tile in tiles]
        return Span(start, stop, tuple(filter(None, before)), tuple(filter(None, after)))


def main() -> None:
    """Proves it for many lengths, draws it, and generates with it."""
    for length in (*range(1, 100), 243, 244, 1000):
        verify(Ternary(length))
    for start in range(40):
        for n in range(1, 41 - start):
            verify_span(Ternary(40), start, n)
    print("both laws hold for 102 lengths, and for every chunk of 40 positions\n")
    print(draw(Ternary(27), format="text"))
    paid = cost(Ternary(2187), fft_price)
    print(f"2,187 positions: {paid.shapes.total():,} tiles of {len(paid.shapes)} shapes\n")

    model = random_model(length=512)
    prompt = list(range(20))
    own = fi.generate(model, prompt, max_new_tokens=300, tiling=Prompted(Ternary(299), len(prompt)))
    usual = fi.generate(model, prompt, max_new_tokens=300)
    print(f"300 tokens by Ternary equal those by the default tiling: {bool((own == usual).all())}")


if __name__ == "__main__":
    main()
