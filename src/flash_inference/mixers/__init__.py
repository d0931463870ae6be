"""WHAT: operations over positions. Here, and only here, tilings meet tensors."""

from __future__ import annotations

from flash_inference.mixers.adaptive_conv import AdaptiveConv
from flash_inference.mixers.attention import Attention, AttentionConfig, AttentionPast, Rotary
from flash_inference.mixers.contribution import Contribution
from flash_inference.mixers.fir import FIR, FIRPast
from flash_inference.mixers.long_conv import LongConv
from flash_inference.mixers.mixer import Mixer, Moment
from flash_inference.mixers.modal import ModalConv, ModalPast
from flash_inference.mixers.online import OnlineConvolution
from flash_inference.mixers.shift import ShiftSSM
from flash_inference.mixers.short_conv import ShortConv, ShortPast
from flash_inference.mixers.stack import Stack, StackState
from flash_inference.mixers.tiled import TiledPast

__all__ = [
    "FIR",
    "AdaptiveConv",
    "Attention",
    "AttentionConfig",
    "AttentionPast",
    "Contribution",
    "FIRPast",
    "LongConv",
    "Mixer",
    "ModalConv",
    "ModalPast",
    "Moment",
    "OnlineConvolution",
    "Rotary",
    "ShiftSSM",
    "ShortConv",
    "ShortPast",
    "Stack",
    "StackState",
    "TiledPast",
]
