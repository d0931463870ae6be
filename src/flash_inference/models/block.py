"""What a block is: the unit that models are stacks of, and what it may keep of the past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flash_inference.filters.filter import Filter
from flash_inference.mixers.mixer import Mixer, Moment


@dataclass(frozen=True, slots=True)
class Convolutions:
    """Long convolutions with one filter: `count` of them, each of `width` channels, and skip terms [channels]."""

    filter: Filter
    width: int
    skip: Tensor | None = None

    @property
    def count(self) -> int:
        """How many convolutions lie side by side in the filter's channels."""
        return self.filter.channels // self.width

    @property
    def stride(self) -> int:
        """The filter's taps are zero at lags that this does not divide."""
        return getattr(self.filter, "stride", 1)


def common_stride(groups: Sequence[Convolutions]) -> int:
    """The stride of filters that lie side by side: theirs if all have the same, else 1."""
    strides = {group.stride for group in groups}
    return strides.pop() if len(strides) == 1 else 1


@dataclass(frozen=True, slots=True)
class BlockPast:
    """What a block finds when it extends: its mixers' pasts in their order, and when it is.

    `mix(o, y)` is the block's long convolution `o` of its inputs y [B, N, D] at the next N positions: z [B, N, D]. Each
    is called once a step, in order; what enters before a row's start is zeroed there.
    """

    pasts: Sequence[Any]
    moment: Moment
    mix: Callable[[int, Tensor], Tensor]


class Block(nn.Module):
    """Hidden states [B, L, D] to hidden states. What a block keeps of the past it declares; all else is per position.

    `convolutions` are paid by tiles, together with those of the other blocks. `mixers` are the modules that keep a past
    of their own, as `mixers.mixer.Mixer` says. Both are empty unless a block says otherwise.
    """

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """The long convolutions, in the order in which `extend` calls `past.mix`."""
        return ()

    @property
    def mixers(self) -> Sequence[Mixer[Any]]:
        """The modules with a past of their own, in the order of `past.pasts`."""
        return ()

    @property
    def activations(self) -> int:
        """Numbers per position that live at once in a chunk, at most: inputs and outputs of all linear layers."""
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return sum(linear.in_features + linear.out_features for linear in linears)

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence at once: x [B, L, D] -> [B, L, D]."""
        raise NotImplementedError

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D], exact for every N."""
        raise NotImplementedError
