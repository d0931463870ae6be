"""What this library is tested with, for use on your own models, tilings and operations.

Oracles compute the same numbers another way, in float64; bounds say from the data how far two correct computations
may lie apart; `random_model` makes models whose greedy runs prove something; `ties` lists the positions at which a
greedy choice is not determined by the precision. Hypothesis strategies are in `flash_inference.testing.strategies`,
the only module that needs hypothesis.
"""

from __future__ import annotations

from flash_inference.testing.attention import attention_oracle
from flash_inference.testing.bounds import FFT_CONSTANT, causal_bound, direct_bound, fft_bound, storage_bound
from flash_inference.testing.modal import modal_filter_oracle, recurrence_bound
from flash_inference.testing.models import random_model
from flash_inference.testing.oracles import (
    causal_conv_oracle,
    hidden_oracle,
    hyena_oracle,
    implicit_filter_oracle,
    model_oracle,
    short_conv_oracle,
    tile_conv_oracle,
)
from flash_inference.testing.ties import Tie, find_ties, greedy_differences

__all__ = [
    "FFT_CONSTANT",
    "Tie",
    "attention_oracle",
    "causal_bound",
    "causal_conv_oracle",
    "direct_bound",
    "fft_bound",
    "find_ties",
    "greedy_differences",
    "hidden_oracle",
    "hyena_oracle",
    "implicit_filter_oracle",
    "modal_filter_oracle",
    "model_oracle",
    "random_model",
    "recurrence_bound",
    "short_conv_oracle",
    "storage_bound",
    "tile_conv_oracle",
]
