"""A model of your own, trained by FFT over whole texts, run by tiles a letter at a time: python examples/own_model.py

The task: texts that repeat themselves every 14 letters. The convolution has to find the delay.
"""

import torch
from torch import Tensor, nn

import flash_inference as fi
from flash_inference.mixers import StackState
from flash_inference.tiling import Blocked

LETTERS, PERIOD, LENGTH, WIDTH = "abcdefghijklmnopqrstuvwxyz !", 14, 256, 32


class Repeater(nn.Module):
    """Embedding, one long convolution with a gate, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.long = nn.Embedding(len(LETTERS), WIDTH), fi.LongConv(WIDTH, LENGTH)
        self.gate, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, len(LETTERS))

    def forward(self, tokens: Tensor, state: StackState | None = None) -> Tensor:
        """A whole text [B, N] to logits [B, N, letters]; with a state, the next N letters of one."""
        x = self.embedding(tokens)
        z = self.long(x) if state is None else self.long.extend(state, x)
        return self.head(z * torch.sigmoid(self.gate(x)))


def main() -> None:
    """Trains, writes on from a phrase, and compares with the forward over what was written."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a tiny model is too little work to share
    optimizer = torch.optim.Adam((model := Repeater()).parameters(), lr=1e-2)
    for step in range(151):
        texts = torch.randint(len(LETTERS), (16, PERIOD)).repeat(1, 5)
        logits, wanted = model(texts[:, :-1])[:, PERIOD:], texts[:, PERIOD + 1 :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:3d}: loss {loss.item():.3f}")
    tokens = [LETTERS.index(letter) for letter in "tile by tile! "]
    with torch.no_grad():
        state = model.long.init(1, Blocked(LENGTH))
        outputs = [model(torch.tensor([tokens]), state)[0]]
        for _ in range(5 * PERIOD):
            tokens.append(int(outputs[-1][-1].argmax()))
            outputs.append(model(torch.tensor([tokens[-1:]]), state)[0])
        full = model(torch.tensor([tokens]))[0]
    print("".join(LETTERS[token] for token in tokens))
    print(f"largest logits difference to the forward: {(torch.cat(outputs) - full).abs().max():.1e}")
    print(f"every letter is the forward's choice too: {full.argmax(-1).tolist()[PERIOD - 1 : -1] == tokens[PERIOD:]}")


if __name__ == "__main__":
    main()
