"""Drafts are taken back as if they had never been, and accepted as if they had been steps."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_inference import LanguageModel
from flash_inference.errors import LengthError, ModelError, StateError, TilingError
from flash_inference.mixers import Stack, StackState
from flash_inference.mixers.draft import StackDraft
from flash_inference.mixers.mixer import Moment, tensors
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.models.draft import FusedBlocks
from flash_inference.models.rewind import mark, rewind
from flash_inference.ops.tile_conv import PreparedFilter
from flash_inference.testing import causal_conv_oracle, random_model
from flash_inference.testing.strategies import chunks, makers, tilings
from flash_inference.tiling import Blocked, Prompted, Relaxed, Separated, Spread
from test_families import LENGTH, MODELS, Leaky, patterns, toy

EXACT = 1e-9
COUNT, WIDTH = 2, 3


def mixed(stack: Stack, state: StackState | StackDraft, y: Tensor) -> Tensor:
    """Outputs [B, N, M D] of all convolutions, each from its own inputs in y [B, N, M D]."""
    of = partial(_drafted, state) if isinstance(state, StackDraft) else partial(stack.mix, state)
    return torch.cat([of(m, y[..., lanes]) for m, lanes in enumerate(stack.lanes)], -1)


def _drafted(draft: StackDraft, m: int, y: Tensor) -> Tensor:
    return draft.mix(m, y.transpose(0, 1)).transpose(0, 1)


def extended(stack: Stack, state: StackState, y: Tensor) -> Tensor:
    """The next positions, in as many chunks as a ring needs."""
    outputs, at = [], 0
    for size in stack.pieces(state, y.shape[1]):
        stack.begin(state, size)
        outputs.append(mixed(stack, state, y[:, at : at + size]))
        stack.commit(state, size)
        at += size
    return torch.cat(outputs, 1)


def tried(stack: Stack, state: StackState, data: st.DataObject, length: int, rho: Tensor) -> None:
    """Drafts at random points of [0, length): right themselves, and without a trace but for what is accepted."""
    twin = stack.bind(state.clone())
    y, at = torch.randn(2, length, COUNT * WIDTH, dtype=torch.float64), 0
    alive = (torch.arange(length) >= state.start[:, None])[..., None]
    exact = causal_conv_oracle(y * alive, rho) + stack.skip * y
    while at < length:
        n = data.draw(st.integers(1, length - at).filter(lambda n: n <= 9) | st.integers(1, min(length - at, 40)))
        z = extended(stack, state, y[:, at : at + n])
        assert torch.equal(z, extended(stack, twin, y[:, at : at + n]))
        assert ((z - exact[:, at : at + n]) * alive[:, at : at + n]).abs().max() <= EXACT
        at += n
        if data.draw(st.booleans()) and at < length:
            stack.settle(state)
            draft, total = StackDraft(stack, state), 0
            for k in data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)):
                k = min(k, length - at - total, 16 - total)
                if k:
                    draft.begin(k)
                    here = slice(at + total, at + total + k)
                    assert ((mixed(stack, draft, y[:, here]) - exact[:, here]) * alive[:, here]).abs().max() <= EXACT
                    total += k
            accepted = data.draw(st.integers(0, total))
            entered = 0
            while entered < accepted:
                entered += stack.enter(state, draft.inputs[entered:accepted])
            for i in range(accepted):
                extended(stack, twin, y[:, at + i : at + i + 1])
            at += accepted
            assert state.clock == twin.clock == at


@settings(max_examples=40)
@given(data=st.data())
def test_drafts_of_convolutions_leave_no_trace(data: st.DataObject) -> None:
    length, taps = data.draw(st.integers(2, 150)), data.draw(st.integers(1, 150))
    rho, skip = torch.randn(COUNT * WIDTH, taps, dtype=torch.float64), torch.randn(COUNT * WIDTH, dtype=torch.float64)
    stack, tiling = Stack(PreparedFilter(rho), WIDTH, skip), data.draw(tilings(length))
    start = data.draw(st.none() | st.lists(st.integers(0, length - 1), min_size=2, max_size=2).map(torch.tensor))
    tried(stack, stack.init(2, tiling, start=start), data, length, rho)


@settings(max_examples=10)
@given(data=st.data())
def test_drafts_in_a_ring_leave_no_trace(data: st.DataObject) -> None:
    taps = data.draw(st.integers(16, 40))
    rho = torch.randn(COUNT * WIDTH, taps, dtype=torch.float64)
    stack, tiling = Stack(PreparedFilter(rho), WIDTH), data.draw(makers())(None, taps)
    tried(stack, stack.init(2, tiling), data, 120, rho)
    state = stack.init(1, tiling)
    with pytest.raises(LengthError, match="positions ahead in a ring; expected at most"):
        stack.ahead(state, stack.chunk(tiling) + 1)


FUSED = {
    "order-2": random_model(2, vocab_size=31, length=LENGTH, dtype=torch.float64),
    "order-3": random_model(3, vocab_size=31, length=LENGTH, dtype=torch.float64, short_taps=4, width=5),
    "order-2-no-short": random_model(2, vocab_size=31, length=LENGTH, dtype=torch.float64, short_taps=1),
}
drafted = pytest.mark.parametrize(
    "model", [*MODELS.values(), *FUSED.values()], ids=["-".join(p) for p in MODELS] + [*FUSED]
)


def same(a: ModelState, b: ModelState) -> None:
    """Every tensor of two states, and every number, is equal."""
    assert (a.clock, a.room) == (b.clock, b.room)
    for one, two in zip(a.pasts, b.pasts, strict=True):
        for left, right in zip(one, two, strict=True):
            for name, tensor in tensors(left).items():
                assert torch.equal(tensor, tensors(right)[name])
    if a.stack and b.stack:
        values = {field.name for field in dataclasses.fields(a.stack)} - {"pushes", "tiling"}
        for name in values:
            left, right = getattr(a.stack, name), getattr(b.stack, name)
            assert torch.equal(left, right) if isinstance(left, Tensor) else left == right, name


@drafted
@settings(max_examples=4)
@given(data=st.data())
def test_rejected_drafts_were_never_there(model: LanguageModel, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, LENGTH))
    decoder, tokens = model.decoder(), torch.randint(31, (2, length))
    start = data.draw(st.none() | st.lists(st.integers(0, length - 1), min_size=2, max_size=2).map(torch.tensor))
    state, at = decoder.init(2, data.draw(tilings(length)), start=start), 0
    twin = decoder.clone(state)
    for n in data.draw(chunks(length)):
        k = data.draw(st.integers(1, min(20, length - at)))
        decoder.settle(twin)
        draft = decoder.draft(state)
        draft.extend(torch.randint(31, (2, k)))
        if data.draw(st.booleans()):
            draft.commit(0)
        same(state, twin)
        logits = decoder.extend(state, tokens[:, at : at + n], every=True)
        assert torch.equal(logits, decoder.extend(twin, tokens[:, at : at + n], every=True))
        at += n


@drafted
@settings(max_examples=4)
@given(data=st.data())
def test_what_is_accepted_knows_nothing_of_the_rest(model: LanguageModel, data: st.DataObject) -> None:
    """Logits of drafts and behind them are the forward's; bits do not depend on the tokens that were taken back."""
    decoder, tokens = model.decoder(), torch.randint(31, (2, LENGTH))
    state, at = decoder.init(2, data.draw(tilings(LENGTH))), 0
    twin, exact = decoder.clone(state), model(tokens)
    while at < LENGTH:
        sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
        total = min(sum(sizes), LENGTH - at)
        n = data.draw(st.integers(0, total) if total > 1 else st.just(1))
        wrong = torch.cat([tokens[:, at : at + n], torch.randint(31, (2, total - n))], 1)
        one, two = decoder.draft(state), decoder.draft(twin)
        pieces = [one.extend(piece) for piece in tokens[:, at : at + total].split(sizes[0], 1)]
        for piece in wrong.split(sizes[0], 1):
            two.extend(piece)
        assert (torch.cat(pieces, 1) - exact[:, at : at + total]).abs().max() <= EXACT
        one.commit(n)
        two.commit(n)
        at += n
        decoder.settle(state)
        decoder.settle(twin)
        same(state, twin)
        if at < LENGTH:
            logits = decoder.extend(state, tokens[:, at : at + 1])
            assert torch.equal(logits, decoder.extend(twin, tokens[:, at : at + 1]))
            assert (logits - exact[:, at]).abs().max() <= EXACT
            at += 1


@patterns
@pytest.mark.parametrize("back", [1, 2, 37])
def test_beyond_drafts_one_rectangle_goes_back(pattern: tuple[str, ...], back: int) -> None:
    model, tokens = MODELS[pattern], torch.randint(31, (2, LENGTH))
    decoder, other = model.decoder(), torch.randint(31, (2, LENGTH))
    state = decoder.init(2, Spread(Separated(LENGTH, 8, 4), 4), start=torch.tensor([0, 1]))
    decoder.extend(state, tokens[:, :back])
    here = mark(state)
    for t in range(back, 75):
        decoder.extend(state, tokens[:, t : t + 1])
    again = rewind(decoder, state, here, Prompted(Blocked(LENGTH - back, 8), back))
    assert len(decoder.due(again)) == (1 if again.stack else 0)
    path = torch.cat([tokens[:, :back], other[:, back:]], 1)
    pieces = [decoder.extend(again, path[:, t : t + 1], every=True) for t in range(back, LENGTH)]
    logits = torch.cat(pieces, 1)
    assert (logits[0] - model(path[:1])[0, back:]).abs().max() <= EXACT
    assert (logits[1] - model(path[1:, 1:])[0, back - 1 :]).abs().max() <= EXACT
    assert (decoder.extend(state, tokens[:, 75:76])[0] - model(tokens[:1, :76])[0, -1]).abs().max() <= EXACT


def test_going_back_asks_for_what_it_needs() -> None:
    model = random_model(dtype=torch.float64, length=64)
    decoder, tokens = Decoder(model, 64), torch.randint(64, (1, 30))
    state = decoder.init(1, Relaxed(64))
    decoder.extend(state, tokens)
    here = mark(state)
    with pytest.raises(StateError, match=r"Relaxed\(64\) begins at 0; expected Prompted\(inner, 30\)"):
        rewind(decoder, state, here, Relaxed(64))
    with pytest.raises(LengthError, match=r"covers 65 positions; the mixers' pasts have room for 64"):
        rewind(decoder, state, here, Prompted(Relaxed(35), 30))
    with pytest.raises(StateError, match="the mark is at position 30, the state at 0"):
        rewind(decoder, decoder.init(1, Relaxed(64)), here, Prompted(Relaxed(34), 30))
    ring = decoder.init(1, Relaxed(None, taps=64))
    decoder.extend(ring, tokens)
    with pytest.raises(StateError, match=r"cannot go back to 30 of 30 positions of Relaxed\(None, taps=64\)"):
        rewind(decoder, ring, here, Prompted(Relaxed(34), 30))


def test_drafts_belong_to_their_position() -> None:
    model = random_model(dtype=torch.float64, length=64)
    decoder, tokens = Decoder(model, 64), torch.randint(64, (1, 64))
    state = decoder.init(1, Blocked(64, 8))
    decoder.extend(state, tokens[:, :60])
    draft = decoder.draft(state)
    draft.extend(tokens[:, :3])
    with pytest.raises(StateError, match=r"cannot commit 4 of 3 drafts; expected 0 to 3\."):
        draft.commit(4)
    with pytest.raises(LengthError, match=r"5 more positions after 60 make 65; the state holds 64\."):
        draft.extend(tokens[:, :2])
    draft.commit(2)
    with pytest.raises(StateError, match=r"made at position 60 and the state is at 62\. Make a new draft\."):
        draft.commit(1)
    with pytest.raises(StateError, match="made at position 60 and the state is at 62"):
        draft.extend(tokens[:, :1])


def test_mixers_without_stack_have_their_own_room() -> None:
    decoder = Decoder(toy(["leaky"]), 10)
    draft = decoder.draft(decoder.init(1, Relaxed(10)))
    draft.extend(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(LengthError, match=r"drafts up to position 11; the state holds 10\."):
        draft.extend(torch.zeros(1, 1, dtype=torch.long))


def test_a_mixer_that_hides_its_inputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Moment, "enter", lambda self, past, x: self.mute(x))
    decoder = Decoder(toy(["leaky"]), 10)
    with pytest.raises(ModelError, match=r"Leaky\.extend did not let its inputs in by moment\.enter\(past, x\)"):
        decoder.draft(decoder.init(1, Relaxed(10))).extend(torch.zeros(1, 2, dtype=torch.long))
    assert Leaky.decodes == "recurrence"


def test_the_error_of_a_bad_tiling_is_the_stacks() -> None:
    model = random_model(dtype=torch.float64, length=64)
    decoder = Decoder(model, 64)
    state = decoder.init(1, Relaxed(64))
    decoder.extend(state, torch.randint(64, (1, 9)))
    with pytest.raises(TilingError, match="pays lags below 4"):
        rewind(decoder, state, mark(state), Prompted(Relaxed(40, taps=4), 9))


@pytest.mark.parametrize("batch", [1, 3])
def test_fused_drafts_of_every_size_are_the_forward(batch: int) -> None:
    """Two drafts of one state take turns in its scratch."""
    model = random_model(3, dtype=torch.float64, width=24, length=LENGTH)
    decoder, tokens = Decoder(model, LENGTH), torch.randint(64, (batch, LENGTH))
    exact = model(tokens)
    for n in range(1, 41):
        state = decoder.init(batch, Blocked(LENGTH, 32))
        decoder.extend(state, tokens[:, :37])
        drafts = [decoder.draft(state), decoder.draft(state)]
        assert all(isinstance(draft.blocks, FusedBlocks) for draft in drafts)
        at = 37
        for size in (n, 3):
            for draft in drafts:
                logits = draft.extend(tokens[:, at : at + size])
                assert (logits - exact[:, at : at + size]).abs().max() <= EXACT
            at += size
        drafts[1].commit(n + 3)
        logits = decoder.extend(state, tokens[:, at : at + 1])
        assert (logits - exact[:, at]).abs().max() <= EXACT


def test_drafts_in_and_out_of_inference_mode_share_scratch() -> None:
    model = random_model(2, dtype=torch.float64, width=24, length=LENGTH)
    decoder, tokens = Decoder(model, LENGTH), torch.randint(64, (1, LENGTH))
    state = decoder.init(1, Blocked(LENGTH, 32))
    decoder.extend(state, tokens[:, :33])
    with torch.inference_mode():
        first = decoder.draft(state)
        logits = first.extend(tokens[:, 33:43])
        first.commit(2)
    assert torch.equal(decoder.draft(state).extend(tokens[:, 35:45])[:, :0], logits[:, :0])
    assert (decoder.extend(state, tokens[:, 35:36]) - model(tokens[:, :36])[:, -1]).abs().max() <= EXACT


def test_what_overflows_behind_does_not_reach_before() -> None:
    """A token that makes infinite inputs leaves the numbers of drafts before it alone."""
    model = random_model(2, width=24, length=LENGTH)
    model.embedding.weight[9] = float("nan")
    decoder, tokens = Decoder(model, LENGTH), torch.randint(9, (1, LENGTH))
    state = decoder.init(1, Blocked(LENGTH, 32))
    decoder.extend(state, tokens[:, :33])
    wanted, wrong = decoder.draft(state).extend(tokens[:, :31]), tokens[:, :31].clone()
    for first in range(31):
        wrong[:, first:] = 9
        assert torch.equal(decoder.draft(state).extend(wrong)[:, :first], wanted[:, :first])
        wrong = tokens[:, :31].clone()
