"""A module that knows nothing of the library, made fast and proved the same: python examples/adapt_module.py"""

import time

import torch
from torch import Tensor, nn

import flash_inference as fi
from flash_inference.errors import ModelError

VOCAB, WIDTH, LENGTH = 50, 32, 1024


class Conv(nn.Module):
    """A learned filter as long as the sequence, by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.d = nn.Parameter(torch.randn(WIDTH, LENGTH) / 16), nn.Parameter(torch.randn(WIDTH, 1))

    def forward(self, u: Tensor) -> Tensor:
        n = u.shape[-1]
        spectrum = torch.fft.rfft(u, n=2 * n) * torch.fft.rfft(self.k[:, :n], n=2 * n)
        return torch.fft.irfft(spectrum, n=2 * n)[..., :n] + self.d * u


class Layer(nn.Module):
    """x + out(gate * conv(value))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inp, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv, self.short = Conv(), nn.Conv1d(2 * WIDTH, 2 * WIDTH, 3, padding=2, groups=2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, v = self.short(self.inp(self.norm(x)).transpose(1, 2))[..., : x.shape[1]].chunk(2, dim=1)
        return x + self.out((gate * self.conv(v)).transpose(1, 2))


def main() -> None:
    """Adapts, generates, and compares with the module's own forward at every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), Layer(), Layer(), nn.Linear(WIDTH, VOCAB)).eval()
    parts = {"*.conv": fi.LongPart(taps="k", skip="d", layout="BDL"), "*.short": fi.ShortPart()}
    fast, prompt = fi.adapt(model, parts, length=LENGTH), torch.randint(VOCAB, (1, 10))
    began = time.perf_counter()
    new = fast.generate(prompt, max_new_tokens=1000)
    print(f"1000 tokens in {time.perf_counter() - began:.2f} s")
    with torch.no_grad():
        full = model(torch.cat([prompt, new], dim=1)).argmax(-1)
    print(f"every token is that of the module's own forward: {bool((full[:, 9:-1] == new).all())}")
    try:
        fi.adapt(model, {"*.conv": parts["*.conv"]}, length=LENGTH)
    except ModelError as error:
        print(f"without the short convolution: {error}")


if __name__ == "__main__":
    main()
