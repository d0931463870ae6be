"""A plucked string, heard from the left by two ears: python examples/stream_audio.py [OUT.wav]

Sound arrives in blocks of any size, and each block's output leaves with it. The ears are measured ones: B. Gardner and
K. Martin, MIT Media Lab, 1994 (see data/README.md).
"""

from __future__ import annotations

import sys
import tempfile
import time
import wave
from pathlib import Path

import numpy as np
import torch

import flash_inference as fi

EARS = Path(__file__).parent / "data" / "kemar_left_60.npz"
NOTES = (196.0, 246.9, 293.7, 392.0, 493.9, 587.3, 493.9, 392.0, 293.7, 392.0)


def pluck(frequency: float, rate: int, rng: np.random.Generator) -> np.ndarray:
    """One second of a string: noise that runs round a loop of one period and loses its edges (Karplus and Strong)."""
    turn, turns = rng.uniform(-1, 1, round(rate / frequency)), []
    for _ in range(-(-rate // len(turn))):
        turns.append(turn)
        turn = 0.996 * (turn + np.roll(turn, 1)) / 2
    return np.concatenate(turns)[:rate]


def main() -> None:
    """Plays the notes through the ears, writes a stereo file, and checks it against the direct sum in float64."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else f"{tempfile.gettempdir()}/plucked.wav")
    with np.load(EARS) as data:
        ears, rate = data["taps"], int(data["rate"])
    torch.set_num_threads(1)  # two channels are too little work to share
    rng = np.random.default_rng(0)
    dry = np.concatenate([pluck(note, rate, rng) for note in NOTES]).astype(np.float32)
    cuts = np.cumsum(rng.integers(1, 2048, len(dry) // 1024))
    blocks = np.split(np.stack([dry, dry], axis=1), cuts[cuts < len(dry)])
    stream = fi.OnlineConvolution(ears)
    start = time.perf_counter()
    wet = np.concatenate([stream.push(block).numpy() for block in blocks])
    seconds = time.perf_counter() - start
    exact = np.stack([np.convolve(dry.astype(np.float64), ear)[: len(dry)] for ear in ears.T.astype(np.float64)], 1)
    peak = np.abs(exact).max()
    with wave.open(str(out), "wb") as file:
        file.setparams((2, 2, rate, 0, "NONE", ""))
        file.writeframes((wet / peak * 32767).round().astype("<i2").tobytes())
    print(f"{len(dry) / rate:.0f} s of sound, {len(ears)} taps x 2 ears, {len(blocks)} blocks of 1 to 2047")
    print(f"computed in {seconds:.2f} s: {len(dry) / rate / seconds:.0f} times as fast as it plays")
    print(f"largest difference to a float64 sum: {np.abs(wet - exact).max() / peak * 32767:.4f} of a 16-bit step")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
