"""Stream text from the shipped model: python examples/generate.py [PROMPT]"""

from __future__ import annotations

import sys
import time

import flash_inference as fi

TOKENS = 600


def main() -> None:
    """Writes the prompt, then each character as soon as it is chosen."""
    prompt = sys.argv[1] if len(sys.argv) > 1 else "ROMEO.\n"
    model = fi.load("shakespeare")
    text = model.tokens.decoder()
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    for token in fi.stream(model, prompt, max_new_tokens=TOKENS, temperature=0.8, seed=0):
        print(text.push(int(token)), end="", flush=True)
    seconds = time.perf_counter() - start
    print(text.finish())
    print(f"\n{TOKENS} characters in {seconds:.2f} s: {TOKENS / seconds:,.0f} a second")


if __name__ == "__main__":
    main()
