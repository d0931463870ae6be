"""`python -m flash_inference.cli`."""

from flash_inference.cli import main

main()
