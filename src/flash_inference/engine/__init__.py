"""The loop: sample, pay, extend. Generation, scoring, verification and plans stand on it."""
