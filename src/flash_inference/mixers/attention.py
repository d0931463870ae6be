"""Causal self-attention with a cache of keys and values that is allocated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from flash_inference.errors import LengthError, ModelError
from flash_inference.mixers.mixer import Moment
from flash_inference.shapes import check_shape

MASK_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions: pair (i, i + d/2) of a head turns by position / interpolation * base^(-2 i / d).

    d is the head's width, or `width`, beyond which a head is left as it is. `interpolation` divides positions linearly.
    Source: Su et al., RoFormer (2021), arXiv 2104.09864; Chen et al., Extending Context Window of Large Language Models
    via Positional Interpolation (2023), arXiv 2306.15595.
    """

    base: float = 10_000.0
    interpolation: float = 1.0
    width: int = 0

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, N, d] turned to positions [B or 1, N]. Angles are formed in float64: float32 loses them at 10^6."""
        turned = self.width or x.shape[-1]
        half = turned // 2
        places = torch.arange(half, device=x.device, dtype=torch.float64)
        angle = (positions.double() / self.interpolation)[:, None, :, None] * self.base ** (-places / half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b, rest = x.split((half, half, x.shape[-1] - turned), dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """One attention layer. Scores are q . k / sqrt(head_width), capped, then lowered by ALiBi, then masked.

    kv_heads: keys and values, each shared by heads / kv_heads query heads in a row (0: one each). head_width: 0 stands
    for width / heads. alibi: one slope a head; a key at distance n has its score lowered by slope n. window: a query
    sees the newest `window` positions, its own included (flash-attn's left window + 1). softcap: scores x become
    softcap tanh(x / softcap). Raises ModelError for numbers that do not fit each other.
    """

    width: int
    heads: int
    kv_heads: int = 0
    head_width: int = 0
    rotary: Rotary | None = None
    alibi: tuple[float, ...] | None = None
    window: int | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1:
            raise ModelError(f"width is {self.width} and heads is {self.heads}; expected at least 1 of each.")
        if self.head_width == 0 and self.width % self.heads:
            raise ModelError(
                f"width {self.width} is no multiple of {self.heads} heads. Give head_width, or other heads."
            )
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_width", self.head_width or self.width // self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ModelError(f"kv_heads is {self.kv_heads}; expected a divisor of heads, {self.heads}.")
        if self.head_width < 1 or (self.rotary is not None and (self.rotary.width or self.head_width) % 2):
            raise ModelError(
                f"heads are {self.head_width} wide; expected at least 1, and an even width for rotary positions."
            )
        if self.rotary is not None and (self.rotary.width % 2 or not 0 <= self.rotary.width <= self.head_width):
            raise ModelError(
                f"rotary width is {self.rotary.width}; expected an even number up to {self.head_width}, the head's "
                "width, or 0 for all of it."
            )
        if self.rotary is not None and not (self.rotary.base > 0 and self.rotary.interpolation > 0):
            raise ModelError(f"{self.rotary} has a base or an interpolation factor that is not positive.")
        if self.alibi is not None and len(self.alibi) != self.heads:
            raise ModelError(f"alibi has {len(self.alibi)} slopes; expected one for each of {self.heads} heads.")
        if self.window is not None and self.window < 1:
            raise ModelError(f"window is {self.window}; expected at least 1 position, a query's own.")
        if self.softcap is not None and not self.softcap > 0:
            raise ModelError(f"softcap is {self.softcap}; expected a positive number, or None for no cap.")


@dataclass(slots=True)
class AttentionPast:
    """`keys` and `values` [B, kv heads, slots, head width]: clock c is in slot c modulo slots."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """out(softmax(scores) v): causal self-attention; each position looks at itself and its row's past.

    `qkv` gives q | k | v side by side, each head by head; `out` joins the heads. Positions count from each row's start.
    Computed by PyTorch's fused attention, but for a softcap, which that does not know. Queries are taken a piece at a
    time, so that a mask stays below 2^25 elements. Cost O(past) per position, or O(window); O(room in the cache) where
    the device holds the clock.
    """

    decodes: ClassVar[str] = "KV cache"
    replays: ClassVar[bool] = True

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
        self.qkv = nn.Linear(config.width, inner + 2 * shared, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.width, bias=config.out_bias)
        self._slopes: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence: x [B, L, D] -> [B, L, D]. O(L^2), or O(L window); differentiable."""
        check_shape("x", x, "B L D", D=self.config.width)
        q, k, v = self.project(x, Moment(0).positions(x.shape[1], x.device))
        return self.join(self.attend(q, k, v, 0, None))

    def init(self, batch: int, length: int) -> AttentionPast:
        """An empty cache with room for `length` positions, or for a window of them."""
        shape = (batch, self.config.kv_heads, self.slots(length), self.config.head_width)
        return AttentionPast(self.qkv.weight.new_zeros(shape), self.qkv.weight.new_zeros(shape))

    def past_bytes(self, length: int) -> int:
        """Bytes of one row's past."""
        return 2 * self.config.kv_heads * self.slots(length) * self.config.head_width * self.qkv.weight.itemsize

    def slots(self, length: int) -> int:
        """Positions that a cache for `length` of them holds."""
        return length if self.config.window is None else min(length, self.config.window)

    def period(self, length: int) -> int:
        """Clocks after which a clock's slot repeats."""
        return self.slots(length)

    def moved(self, past: AttentionPast, known: range, clock: int, length: int) -> AttentionPast:
        """One row's keys and values of the clocks `known`, as far as they are kept, as if they ended before `clock`."""
        moved = self.init(1, length)
        slots, old = moved.keys.shape[2], past.keys.shape[2]
        kept = torch.arange(known.stop - min(len(known), slots, old), known.stop, device=past.keys.device)
        places = (kept + clock - known.stop) % slots
        moved.keys[:, :, places] = past.keys[:, :, kept % old]
        moved.values[:, :, places] = past.values[:, :, kept % old]
        return moved

    @torch.no_grad()
    def extend(self, past: AttentionPast, x: Tensor, moment: Moment) -> Tensor:
        """The next N positions x [B, N, D] -> [B, N, D], exact anywhere; `past` is advanced in place.

        Positions before a row's start are seen by none after it; what they give is finite and means nothing. Raises
        LengthError if the cache is full.
        """
        check_shape("x", x, "B N D", B=past.keys.shape[0], D=self.config.width)
        if isinstance(moment.clock, Tensor):
            return self.step(past, x, moment, moment.clock)
        N, clock, slots = x.shape[1], moment.clock, past.keys.shape[2]
        windowed = self.config.window is not None and slots == self.config.window
        if clock + N - moment.first_start > slots and not windowed:
            raise LengthError(
                f"{N} more positions after {clock} make {clock + N}; the cache holds {slots}. Make it with "
                f"init(batch, {clock + N})."
            )
        q, k, v = self.project(moment.enter(past, x), moment.positions(N, x.device))
        known = min(clock, slots)
        if clock + N > slots and N > 1:
            order = torch.arange(clock - known, clock, device=x.device) % slots
            keys, values = (
                torch.cat([old[:, :, order], new], dim=2) for old, new in ((past.keys, k), (past.values, v))
            )
            self.store(past, k, v, clock)
        else:
            self.store(past, k, v, clock)
            known = min(clock + N, slots)
            keys, values = past.keys[:, :, :known], past.values[:, :, :known]
        start = None if moment.begun_by(clock + N - keys.shape[2]) else moment.start
        return self.join(self.attend(q, keys, values, clock, start))

    def step(self, past: AttentionPast, x: Tensor, moment: Moment, clock: Tensor) -> Tensor:
        """One position x [B, 1, D] -> [B, 1, D] at a clock [1] that the device holds.

        All slots are weighed, under a mask of those that hold a position of the row's own: the work is the same
        wherever a graph is replayed.
        """
        q, k, v = self.project(moment.enter(past, x), moment.positions(1, x.device))
        slots = past.keys.shape[2]
        for kept, new in ((past.keys, k), (past.values, v)):
            kept.index_copy_(2, clock % slots, new.to(kept.dtype))
        distance = (clock - torch.arange(slots, device=x.device)) % slots
        start = 0 if moment.start is None else moment.start[:, None, None, None]
        allowed = (clock - distance)[None, None, None] >= start
        return self.join(self.weigh(q, past.keys, past.values, distance[None], allowed))

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, N, d], keys and values [B, kv heads, N, d] of x [B, N, D] at positions [B or 1, N]."""
        H, G, d = self.config.heads, self.config.kv_heads, self.config.head_width
        heads = self.qkv(x).unflatten(-1, (H + 2 * G, d)).transpose(1, 2)
        q, k, v = heads.split((H, G, G), dim=1)
        rotary = self.config.rotary
        return (q, k, v) if rotary is None else (rotary.turn(q, positions), rotary.turn(k, positions), v)

    def store(self, past: AttentionPast, k: Tensor, v: Tensor, clock: int) -> None:
        """Writes the newest keys and values to their slots."""
        N, slots = k.shape[2], past.keys.shape[2]
        newest = torch.arange(max(clock, clock + N - slots), clock + N, device=k.device) % slots
        past.keys.index_copy_(2, newest, k[:, :, -slots:].to(past.keys.dtype))
        past.values.index_copy_(2, newest, v[:, :, -slots:].to(past.values.dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, clock: int, start: Tensor | None) -> Tensor:
        """[B, H, N, d]: queries at clock .. clock + N - 1 weigh the S newest keys, in rows that begin at `start` [B].

        Keys are in order of time; for a single query they may be in the order of a ring.
        """
        config, (N, S), stop = self.config, (q.shape[2], k.shape[2]), clock + q.shape[2]
        plain = config.alibi is None and config.window is None and config.softcap is None and start is None
        if plain and (N == 1 or N == S):
            return fused(q, k, v, is_causal=N > 1)
        seen = torch.arange(stop - S, stop, device=q.device)
        if N == 1:
            seen = seen.roll(stop % S)
        outputs, size = [q[:, :, :0]], self.queries(S, q.shape[0])
        for at in range(0, N, size):
            end = min(at + size, N)
            last = S - N + end
            first = 0 if config.window is None or N == 1 else max(0, last - (end - at) - config.window + 1)
            keys = slice(first, last)
            distance = torch.arange(clock + at, clock + end, device=q.device)[:, None] - seen[keys]
            allowed = distance >= 0 if config.window is None else (distance >= 0) & (distance < config.window)
            if start is None:
                allowed = allowed[None, None]
            else:
                # A query before its row's start sees itself, since a softmax over nothing is NaN.
                begun = seen[keys] >= start.to(q.device)[:, None, None, None]
                allowed = allowed & (begun | (distance == 0))
            outputs.append(self.weigh(q[:, :, at:end], k[:, :, keys], v[:, :, keys], distance, allowed))
        return torch.cat(outputs, dim=2)

    def queries(self, keys: int, rows: int) -> int:
        """Queries that are weighed at a time, so that masks stay small and a window sees few keys in vain."""
        config = self.config
        heads = 1 if config.alibi is None and config.softcap is None else config.heads
        most = keys if config.window is None else max(config.window, 128)
        return max(1, min(most, MASK_ELEMENTS // max(rows * heads * keys, 1)))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, allowed: Tensor) -> Tensor:
        """softmax(scores) v [B, H, N, d] where `allowed` [B or 1, 1, N, S], for keys at `distance` [N, S]."""
        config = self.config
        lowered = None
        if config.alibi is not None:
            lowered = (-self.slopes(q.device) * distance).to(torch.promote_types(q.dtype, torch.float32))
        # The fused kernel reads a mask in the queries' dtype, in which 16 bits do not hold large distances.
        if config.softcap is None and (lowered is None or q.itemsize >= 4):
            mask = allowed if lowered is None else lowered.masked_fill(~allowed, -torch.inf)
            return fused(q, k, v, mask)
        dtype = torch.promote_types(q.dtype, torch.float32)
        k, v = (x.to(dtype).repeat_interleave(config.heads // config.kv_heads, dim=1) for x in (k, v))
        scores = q.to(dtype) @ k.mT / config.head_width**0.5
        scores = scores if config.softcap is None else config.softcap * torch.tanh(scores / config.softcap)
        scores = scores if lowered is None else scores + lowered
        return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).to(q.dtype)

    def slopes(self, device: torch.device) -> Tensor:
        """ALiBi's slopes [H, 1, 1] in float64, kept on the device: a graph cannot fetch them."""
        if self._slopes is None or self._slopes.device != device:
            with torch.inference_mode(False):
                self._slopes = torch.tensor(self.config.alibi, device=device, dtype=torch.float64)[:, None, None]
        return self._slopes

    def join(self, heads: Tensor) -> Tensor:
        """Heads [B, H, N, d] -> [B, N, D]."""
        return self.out(heads.transpose(1, 2).flatten(2))


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """PyTorch's fused attention of q [B, H, N, d] over k, v [B, G, S, d], heads of keys shared by H / G of queries."""
    (H, N), G = q.shape[1:3], k.shape[1]
    attention = nn.functional.scaled_dot_product_attention
    if N > 1 or H == G:
        return attention(q, k, v, mask, is_causal=is_causal, enable_gqa=H != G)
    # Single queries that share keys become the queries of one head: PyTorch would copy the keys for each of them.
    if mask is not None and mask.shape[1] == H:
        mask = mask.unflatten(1, (G, H // G)).flatten(2, 3)
    return attention(q.unflatten(1, (G, H // G)).flatten(2, 3), k, v, mask).reshape(q.shape)
