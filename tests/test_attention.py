"""Attention against one query at a time in numpy, with a bound that the oracle carries along."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_inference.errors import LengthError, ModelError
from flash_inference.mixers import Attention, AttentionConfig, Moment, Rotary, attention
from flash_inference.testing import attention_oracle
from flash_inference.testing.strategies import chunks

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
SLOPES = (0.5, 0.25, 0.125, 0.0625)

CONFIGS = {
    "plain": AttentionConfig(8, 2),
    "grouped-biases": AttentionConfig(8, 4, 2, qkv_bias=True, out_bias=True),
    "one-kv-head-wide": AttentionConfig(8, 4, 1, head_width=6),
    "rotary": AttentionConfig(8, 2, rotary=Rotary()),
    "rotary-interpolated": AttentionConfig(8, 2, 1, rotary=Rotary(500_000.0, 16.0)),
    "alibi": AttentionConfig(8, 4, alibi=SLOPES),
    "rotary-part": AttentionConfig(8, 2, rotary=Rotary(width=2)),
    "window": AttentionConfig(8, 2, window=5, rotary=Rotary()),
    "window-1": AttentionConfig(8, 2, window=1),
    "cap": AttentionConfig(8, 2, softcap=0.3),
    "window-alibi-cap-grouped": AttentionConfig(8, 4, 2, window=9, alibi=SLOPES, softcap=0.3),
}


def made(config: AttentionConfig, dtype: torch.dtype) -> Attention:
    """Weights large enough that scores reach several units, and so a softmax that is far from uniform."""
    layer = Attention(config).to(dtype).requires_grad_(False)
    layer.qkv.weight.normal_().mul_(0.7)
    for p in (layer.qkv.bias, layer.out.bias):
        if p is not None:
            p.normal_()
    return layer


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_and_steps_are_the_definition(config: AttentionConfig, dtype: torch.dtype) -> None:
    layer, x = made(config, dtype), torch.randn(2, 37, 8, dtype=dtype)
    exact, bound = attention_oracle(x, layer.state_dict(), config, eps=EPS[dtype])
    assert bound.max() < 1e-2 * exact.abs().max() if dtype == torch.float32 else bound.max() < 1e-9
    assert ((layer(x) - exact).abs() <= bound).all()
    for sizes in ([1] * 37, [3, 1, 20, 1, 1, 11], [36, 1]):
        past, clock, pieces = layer.init(2, 37), 0, []
        for n in sizes:
            pieces.append(layer.extend(past, x[:, clock : clock + n], Moment(clock)))
            clock += n
        assert ((torch.cat(pieces, dim=1) - exact).abs() <= bound).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_masks_in_pieces_change_nothing(config: AttentionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made(config, torch.float64), torch.randn(2, 300, 8, dtype=torch.float64)
    start = torch.tensor([0, 40])
    whole = layer(x)
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 4000)
    past = layer.init(2, 300)
    out = torch.cat([layer.extend(past, x[:, :50], Moment(0)), layer.extend(past, x[:, 50:], Moment(50))], dim=1)
    assert (out - whole).abs().max() <= 1e-9
    past = layer.init(2, 300)
    ragged = torch.cat([layer.extend(past, p, Moment(c, start)) for p, c in ((x[:, :50], 0), (x[:, 50:], 50))], dim=1)
    assert (ragged[0] - whole[0]).abs().max() <= 1e-9
    assert (ragged[1, 40:] - layer(x[1:, 40:])[0]).abs().max() <= 1e-9


@given(data=st.data())
@settings(max_examples=20)
def test_a_window_outlives_the_length_it_was_made_for(data: st.DataObject) -> None:
    """A ring never fills: its memory is the window's, for as many positions as come."""
    window = data.draw(st.integers(1, 12))
    config = AttentionConfig(8, 2, window=window, rotary=Rotary())
    layer, x = made(config, torch.float64), torch.randn(1, 60, 8, dtype=torch.float64)
    past, clock, pieces = layer.init(1, 10_000), 0, []
    assert past.keys.shape[2] == window
    for n in data.draw(chunks(60)):
        pieces.append(layer.extend(past, x[:, clock : clock + n], Moment(clock)))
        clock += n
    assert (torch.cat(pieces, dim=1) - layer(x)).abs().max() <= 1e-9


def test_rotary_positions_hold_at_a_million() -> None:
    """Only differences of positions count: a row that begins at clock 2^20 equals one that begins at 0, in float32."""
    turned = Rotary(10_000.0)
    q, k = torch.randn(1, 1, 9, 64), torch.randn(1, 1, 9, 64)
    near, far = torch.arange(9)[None], (1 << 20) + torch.arange(9)[None]
    scores = [turned.turn(q, p) @ turned.turn(k, p).mT for p in (near, far)]
    magnitude = 2 * q.abs() @ k.abs().mT
    assert ((scores[0] - scores[1]).abs() <= 80 * EPS[torch.float32] * magnitude).all()


def test_bfloat16_alibi_keeps_large_distances() -> None:
    """A slope times 3,001 is not a bfloat16: scores are summed in float32 all the same."""
    config = AttentionConfig(4, 1, alibi=(0.01,))
    layer = Attention(config).bfloat16().requires_grad_(False)
    x = torch.randn(1, 3000, 4).bfloat16()
    exact = Attention(config).requires_grad_(False)
    exact.load_state_dict(layer.state_dict())
    assert (layer(x).float() - exact(x.float())).abs().max() <= 4 * 2**-8 * exact(x.float()).abs().max()


def test_a_full_cache_is_named() -> None:
    layer = made(CONFIGS["plain"], torch.float64)
    past = layer.init(1, 4)
    layer.extend(past, torch.randn(1, 3, 8, dtype=torch.float64), Moment(0))
    with pytest.raises(LengthError, match=r"2 more positions after 3 make 5; the cache holds 4\. .*init\(batch, 5\)"):
        layer.extend(past, torch.randn(1, 2, 8, dtype=torch.float64), Moment(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "width 8 is no multiple of 3 heads"),
        ({"heads": 0}, "heads is 0"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads is 3; expected a divisor of heads, 4"),
        ({"heads": 8, "rotary": Rotary()}, "heads are 1 wide; expected at least 1, and an even width"),
        ({"heads": 2, "rotary": Rotary(width=6)}, "rotary width is 6; expected an even number up to 4, the head's"),
        ({"heads": 2, "rotary": Rotary(interpolation=0.0)}, "interpolation factor that is not positive"),
        ({"heads": 2, "alibi": (1.0,)}, "alibi has 1 slopes; expected one for each of 2 heads"),
        ({"heads": 2, "window": 0}, "window is 0; expected at least 1"),
        ({"heads": 2, "softcap": 0.0}, "softcap is 0.0; expected a positive number"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        AttentionConfig(8, **settings)
