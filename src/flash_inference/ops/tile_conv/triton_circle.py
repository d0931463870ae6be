"""Tiles by transforms that read and write time-major state themselves: numbers in registers, channels across lanes.

A program transforms E T places of L channels. It holds them as E tensors [T, L] of real and of imaginary parts, so that
a transform of E numbers is arithmetic between tensors, which moves nothing; then numbers and rows change places once,
through shared memory, and a transform of T numbers follows. Neighbouring channels lie in neighbouring lanes, as they
do in the state: all loads and stores are dense.

Compiled for a device the kernels are Gluon's, in which the layout of a tensor is said rather than found: where Triton
finds the same ones, it searches for up to a minute a kernel. Under the interpreter, which has no layouts, they are
Triton's.
"""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_inference.ops.tile_conv.triton import ONCE

EXPLICIT = tl.constexpr(not knobs.runtime.interpret)
jit = gluon.jit if EXPLICIT else triton.jit


@triton.constexpr_function
def cosine(part, whole):
    """cos(2 pi part / whole)."""
    return math.cos(2 * math.pi * part / whole)


@triton.constexpr_function
def sine(part, whole):
    """sin(2 pi part / whole)."""
    return math.sin(2 * math.pi * part / whole)


@triton.constexpr_function
def reversed_bits(number, size):
    """The bits of a number below `size` in the other order."""
    bits = size.bit_length() - 1
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0


@triton.constexpr_function
def levels(size):
    """log2."""
    return size.bit_length() - 1


@triton.jit
def _halve(re, im, SPAN: tl.constexpr):
    """One level of a transform by decimation in frequency: sums and turned differences, SPAN numbers apart."""
    E: tl.constexpr = len(re)
    p = ()
    q = ()
    for i in tl.static_range(E):
        if i % (2 * SPAN) < SPAN:
            p = p + (re[i] + re[i + SPAN],)
            q = q + (im[i] + im[i + SPAN],)
        else:
            x = re[i - SPAN] - re[i]
            y = im[i - SPAN] - im[i]
            if i % SPAN == 0:
                p = p + (x,)
                q = q + (y,)
            elif i % SPAN * 2 == SPAN:
                p = p + (y,)
                q = q + (-x,)
            else:
                p = p + (x * cosine(i % SPAN, 2 * SPAN) + y * sine(i % SPAN, 2 * SPAN),)
                q = q + (y * cosine(i % SPAN, 2 * SPAN) - x * sine(i % SPAN, 2 * SPAN),)
    return p, q


@triton.jit
def dft(re, im):
    """X[k] = sum of x[n] exp(-2 pi i n k / E) over the E numbers that a lane holds. Swapped, re and im go back."""
    E: tl.constexpr = len(re)
    for level in tl.static_range(levels(E)):
        re, im = _halve(re, im, E >> (level + 1))
    p = ()
    q = ()
    for i in tl.static_range(E):
        p = p + (re[reversed_bits(i, E)],)
        q = q + (im[reversed_bits(i, E)],)
    return p, q


@triton.constexpr_function
def spread(lanes, numbers, warps):
    """Where [rows, lanes] stand, or [rows, lanes, 2, 2, ..] with so many axes of two numbers that a lane holds."""
    wide = min(lanes, 32)
    across = max(1, lanes // 32)
    ones = [1] * numbers
    return gl.BlockedLayout(
        [1, 1] + [2] * numbers,
        [32 // wide, wide, *ones],
        [warps // across, across, *ones],
        list(range(numbers + 1, -1, -1)),
    )


@triton.jit
def rows(T: tl.constexpr, L: tl.constexpr):
    """0 .. T - 1 as [T, 1], for tensors [T, L]."""
    if EXPLICIT:
        return gl.arange(0, T, gl.SliceLayout(1, spread(L, 0, gl.num_warps())))[:, None]
    else:
        return tl.arange(0, T)[:, None]


@triton.jit
def lanes(L: tl.constexpr):
    """0 .. L - 1 as [1, L], for tensors [T, L]."""
    if EXPLICIT:
        return gl.arange(0, L, gl.SliceLayout(0, spread(L, 0, gl.num_warps())))[None, :]
    else:
        return tl.arange(0, L)[None, :]


@triton.jit
def plain(x, L: tl.constexpr):
    """What splits leave, a layout by its name: nothing moves."""
    if EXPLICIT:
        return gl.convert_layout(x, spread(L, 0, gl.num_warps()), assert_trivial=True)
    else:
        return x


@triton.jit
def exchange(x, T: tl.constexpr, L: tl.constexpr):
    """E tensors [T, L] -> T tensors [E, L]: number and row change places. One pass through shared memory."""
    E: tl.constexpr = len(x)
    for _ in tl.static_range(levels(E)):
        both = ()
        for i in tl.static_range(len(x) // 2):
            both = both + (tl.join(x[i], x[i + len(x) // 2]),)
        x = both
    whole = tl.permute(tl.reshape(x[0], (T, L, E)), (2, 1, 0))
    whole = tl.reshape(whole, (E, L) + (2,) * levels(T))
    if EXPLICIT:
        whole = gl.convert_layout(whole, spread(L, levels(T), gl.num_warps()))
    x = (whole,)
    for _ in tl.static_range(levels(T)):
        low = ()
        high = ()
        for i in tl.static_range(len(x)):
            first, second = tl.split(x[i])
            low = low + (first,)
            high = high + (second,)
        x = low + high
    y = ()
    for i in tl.static_range(T):
        y = y + (plain(x[i], L),)
    return y


@triton.jit
def turned(re, im, table, row, stride, step, size, BACK: tl.constexpr):
    """Number i of each lane's, times table[row stride + i step], or its conjugate if BACK. Parts `size` apart."""
    p = ()
    q = ()
    for i in tl.static_range(len(re)):
        at = table + row * stride + i * step
        c = tl.load(at)
        s = tl.load(at + size)
        if BACK:
            s = -s
        p = p + (re[i] * c - im[i] * s,)
        q = q + (re[i] * s + im[i] * c,)
    return p, q


@triton.jit
def forward(re, im, table, E: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """A transform of E T places: place a T + b in number a of row b -> frequency ka + E kb in number kb of row ka."""
    row = rows(T, L)
    re, im = dft(re, im)
    re, im = turned(re, im, table, row, E, 1, E * T, False)
    return dft(exchange(re, T, L), exchange(im, T, L))


@triton.jit
def backward(re, im, table, E: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """The unscaled inverse of `forward`, but for what stood before it."""
    row = rows(E, L)
    im, re = dft(im, re)
    re, im = turned(re, im, table, row, 1, E, E * T, True)
    im, re = dft(exchange(im, E, L), exchange(re, E, L))
    return re, im


@triton.jit
def source(given, begun, start, sources, first, lane, wanted, C, ring, n):
    """The sources n [T, 1] of some channels, the first of them in row `start`; zero if there is none, or not yet."""
    row = start + n
    row = tl.where((ring > 0) & (row >= ring), row - ring, row).to(tl.int64)
    known = wanted & (n >= 0) & (n < sources) & (n >= begun)
    return tl.load(given + row * C + first + lane, known, 0.0, eviction_policy=ONCE).to(tl.float32)


@triton.jit
def read(
    given, since, sequences, start, sources, before, position, first, lane, wanted, C, ring, place, STEP, size,
    E: tl.constexpr, T: tl.constexpr, L: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Places `place` + (a T + b) STEP of a circle, turned by exp(2 pi i a / 4 E): E pairs of parts [T, L].

    Sources stand behind `before` places; if there are MORE than the circle has, they go on in a second round, where
    they are imaginary. Rows go on at 0 where a `ring` ends, unless that is 0. The first source is position `position`;
    lane c belongs to sequence c % sequences, which begins at position since[c % sequences].
    """
    begun = tl.load(since + (first + lane) % sequences) - position
    p = ()
    q = ()
    for a in tl.static_range(E):
        n = place + (a * T + rows(T, L)) * STEP - before
        x = source(given, begun, start, sources, first, lane, wanted, C, ring, n)
        re = x * cosine(a, 4 * E)
        im = x * sine(a, 4 * E)
        if MORE:
            x = source(given, begun, start, sources, first, lane, wanted & (n >= 0), C, ring, n + size)
            re = re - x * sine(a, 4 * E)
            im = im + x * cosine(a, 4 * E)
        p = p + (re,)
        q = q + (im,)
    return p, q


@triton.jit
def target(sums, history, start, targets, first, lane, wanted, C, ring, n):
    """Adds sums to the targets n, as far as there are such; the first of them is row `start`."""
    row = start + n
    row = tl.where((ring > 0) & (row >= ring), row - ring, row).to(tl.int64)
    at = history + row * C + first + lane
    known = wanted & (n >= 0) & (n < targets)
    stands = tl.load(at, known, 0.0, eviction_policy=ONCE).to(tl.float32)
    tl.store(at, (stands + sums).to(history.dtype.element_ty), known, eviction_policy=ONCE)


@triton.jit
def add(
    re, im, history, start, targets, behind, first, lane, wanted, C, ring, place, STEP, size, E: tl.constexpr,
    T: tl.constexpr, L: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Adds to the targets what `read`'s places hold when they are turned back.

    They begin at place `behind` of the second round, which is imaginary; if there are MORE than the circle has places,
    at one of the first, which is real.
    """
    for a in tl.static_range(E):
        n = place + (a * T + rows(T, L)) * STEP - behind
        sums = im[a] * cosine(a, 4 * E) - re[a] * sine(a, 4 * E)
        target(sums, history, start, targets, first, lane, wanted, C, ring, n)
        if MORE:
            sums = re[a] * cosine(a, 4 * E) + im[a] * sine(a, 4 * E)
            target(sums, history, start, targets, first, lane, wanted, C, ring, n - size)


@triton.jit
def times(re, im, spectrum, first, size, wanted, C, E: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """Number kb of row ka times row first + ka + E kb of `spectrum`, whose parts stand `size` apart."""
    row = rows(E, L)
    p = ()
    q = ()
    for i in tl.static_range(T):
        at = spectrum + (first + row + i * E).to(tl.int64) * C
        c = tl.load(at, wanted, 0.0, eviction_policy=ONCE)
        s = tl.load(at + size, wanted, 0.0, eviction_policy=ONCE)
        p = p + (re[i] * c - im[i] * s,)
        q = q + (re[i] * s + im[i] * c,)
    return p, q


# What differs from chunk to chunk is not specialised: to compile a kernel anew stops a run for a second.


@jit(do_not_specialize=["sequences", "start", "sources", "before", "position", "first", "count"])
def inward(
    given, since, scratch, table, turns, sequences, start, sources, before, position, first, count, ring, wide, R,
    E: tl.constexpr, T: tl.constexpr, L: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """The outer factor, forward: scratch[:, k1, n2] from the places n1 R + n2, for each n2 < R."""
    lane = tl.program_id(0) * L + lanes(L)
    wanted = lane < count
    n2 = tl.program_id(1)
    V = R * (E * T)
    re, im = read(
        given, since, sequences, start, sources, before, position, first, lane, wanted, wide, ring, n2, R, V, E, T, L,
        MORE,
    )  # fmt: skip
    re, im = forward(re, im, table, E, T, L)
    re, im = turned(re, im, turns + n2 * (E * T), rows(E, L), 1, E, V, False)
    high = scratch + V * tl.cast(count, tl.int64)
    for i in tl.static_range(T):
        at = ((rows(E, L) + i * E) * R + n2).to(tl.int64) * count + lane
        tl.store(scratch + at, re[i], wanted, eviction_policy=ONCE)
        tl.store(high + at, im[i], wanted, eviction_policy=ONCE)


@jit(
    do_not_specialize=[
        "sequences", "start", "sources", "before", "position", "first", "count", "column", "width", "batch", "begin",
        "targets", "behind",
    ]
)  # fmt: skip
def across(
    given, since, scratch, table, spectrum, history, sequences, start, sources, before, position, first, count, column,
    size, width, batch, begin, targets, behind, ring, wide, C, E: tl.constexpr, T: tl.constexpr, L: tl.constexpr,
    MORE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The inner factor, there and back with spectra between: of one k1 in scratch, or of a WHOLE circle.

    A whole circle comes from the sources and goes to the targets: one pass over the state.
    """
    lane = tl.program_id(0) * L + lanes(L)
    wanted = lane < count
    k1 = tl.program_id(1)
    low = scratch + tl.cast(k1 * (E * T), tl.int64) * count
    high = low + size * tl.cast(count, tl.int64)
    if WHOLE:
        re, im = read(
            given, since, sequences, start, sources, before, position, first, lane, wanted, wide, ring, 0, 1, size, E,
            T, L, MORE,
        )  # fmt: skip
    else:
        re = ()
        im = ()
        for a in tl.static_range(E):
            at = (rows(T, L) + a * T) * count + lane
            re = re + (tl.load(low + at, wanted, 0.0, eviction_policy=ONCE),)
            im = im + (tl.load(high + at, wanted, 0.0, eviction_policy=ONCE),)
    re, im = forward(re, im, table, E, T, L)
    apart = size * tl.cast(width, tl.int64)
    re, im = times(re, im, spectrum + column + lane // batch, k1 * (E * T), apart, wanted, width, E, T, L)
    re, im = backward(re, im, table, E, T, L)
    if WHOLE:
        add(re, im, history, begin, targets, behind, first, lane, wanted, C, ring, 0, 1, size, E, T, L, MORE)
    else:
        for a in tl.static_range(E):
            at = (rows(T, L) + a * T) * count + lane
            tl.store(low + at, re[a], wanted, eviction_policy=ONCE)
            tl.store(high + at, im[a], wanted, eviction_policy=ONCE)


@jit(do_not_specialize=["begin", "targets", "behind", "first", "count"])
def outward(
    scratch, table, turns, history, begin, targets, behind, first, count, ring, C, R, E: tl.constexpr,
    T: tl.constexpr, L: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """The outer factor, back: from scratch as `inward` laid it out to what is added to the targets."""
    lane = tl.program_id(0) * L + lanes(L)
    wanted = lane < count
    n2 = tl.program_id(1)
    V = R * (E * T)
    high = scratch + V * tl.cast(count, tl.int64)
    re = ()
    im = ()
    for i in tl.static_range(T):
        at = ((rows(E, L) + i * E) * R + n2).to(tl.int64) * count + lane
        re = re + (tl.load(scratch + at, wanted, 0.0, eviction_policy=ONCE),)
        im = im + (tl.load(high + at, wanted, 0.0, eviction_policy=ONCE),)
    re, im = turned(re, im, turns + n2 * (E * T), rows(E, L), 1, E, V, True)
    re, im = backward(re, im, table, E, T, L)
    add(re, im, history, begin, targets, behind, first, lane, wanted, C, ring, n2, R, V, E, T, L, MORE)
