"""A model of one's own from long and short convolutions: trained by FFT, run by tiles: python examples/own_layers.py"""

import torch
from torch import Tensor, nn

import flash_inference as fi
from flash_inference.mixers import Moment
from flash_inference.tiling import Relaxed

VOCAB, WIDTH, LENGTH = 16, 16, 300


class Layer(nn.Module):
    """x + out(long(short(x)) * gate(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.short, self.long = fi.ShortConv(WIDTH, taps=4), fi.LongConv(WIDTH, LENGTH)

    def init(self) -> tuple:
        """The states of an empty past: what the inputs so far owe to later ones."""
        return self.short.init(1), self.long.init(1, Relaxed(LENGTH))

    def forward(self, x: Tensor, states: tuple | None = None) -> Tensor:
        """A whole sequence [B, L, D]; with the layer's states, the next positions of one."""
        y = self.norm(x)
        s = self.short(y) if states is None else self.short.extend(states[0], y, Moment(states[1].clock))
        z = self.long(s) if states is None else self.long.extend(states[1], s)
        return x + self.out(z * torch.sigmoid(self.gate(y)))


def main() -> None:
    """Learns sequences that repeat after 20, goes on with one, compares with the forward over all of it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a tiny model is too little work to share
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), Layer(), Layer(), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(41):
        tokens = torch.randint(VOCAB, (16, 20)).repeat(1, 4)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss after training: {loss.item():.3f}")
    embed, first, second, head = model
    new, states, logits = torch.randint(VOCAB, (1, 20)).repeat(1, 2), (first.init(), second.init()), []
    tokens = new[:, :0]
    with torch.no_grad():
        while tokens.shape[1] < LENGTH:
            logits.append(head(second(first(embed(new), states[0]), states[1])))
            tokens, new = torch.cat([tokens, new], dim=1), logits[-1][:, -1:].argmax(-1)
        full = model(tokens)
    print(f"largest logits difference to the forward: {(torch.cat(logits, 1) - full).abs().max():.1e}")
    print(f"every token is the forward's choice too: {bool((full.argmax(-1)[:, 39:-1] == tokens[:, 40:]).all())}")


if __name__ == "__main__":
    main()
