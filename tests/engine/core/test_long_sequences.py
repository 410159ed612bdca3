"""Sequences that outgrow the original context of their model: all of their tokens are computed once more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.digests import (
    DigestRunner,
    DigestSampler,
    LowGrammars,
    Told,
    WrongPage,
    make_core,
    make_request,
    model_info,
    run_to_end,
)
from support.examples import examples

from engine.api.requests import Request
from engine.cache.block_pool import extend_keys
from engine.scheduling import sequence_memory
from engine.scheduling.sequence_memory import SequenceMemory

ORIGINAL = 24
ROOMY = model_info(num_blocks=256, original_context=ORIGINAL)


def computed(runner: DigestRunner, request: Request) -> dict[int, list[int]]:
    """For each candidate, how often each of its tokens was computed, by position."""
    counts: dict[int, Counter[int]] = {}
    for chunk in (chunk for batch in runner.batches for chunk in batch):
        if chunk.sequence.request.id == request.id:
            positions = range(chunk.start, chunk.start + chunk.num_tokens)
            counts.setdefault(chunk.sequence.candidate, Counter()).update(positions)
    return {candidate: [counts[candidate][p] for p in range(max(counts[candidate]) + 1)] for candidate in counts}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_sequence_that_outgrows_the_context_is_computed_again_once(ahead: bool) -> None:
    core, runner = make_core(info=ROOMY, ahead=ahead)
    request = make_request(prompt=range(10, 20), max_tokens=30, stop_ids=())
    told = run_to_end(core, request)["r"]
    assert len(told.tokens[0]) == 30
    assert computed(runner, request) == {0: [2] * ORIGINAL + [1] * 15}
    assert core.stats().preemptions == 0
    assert told.done is not None
    assert told.done.cached_tokens == 0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("length", "tokens"), [(ORIGINAL + 1, 9), (ORIGINAL - 5, 6), (ORIGINAL, 1), (3, 8)])
def test_no_other_sequence_is_computed_again(length: int, tokens: int, ahead: bool) -> None:
    """A prompt beyond the context is long from its first token on; a last token is computed by nobody."""
    core, runner = make_core(info=ROOMY, ahead=ahead)
    request = make_request(prompt=range(10, 10 + length), max_tokens=tokens, stop_ids=())
    run_to_end(core, request)
    assert computed(runner, request) == {0: [1] * (length + tokens - 1)}


def test_of_several_candidates_one_goes_first_and_the_others_find_the_prompt() -> None:
    core, runner = make_core(info=ROOMY)
    request = make_request(prompt=range(10, 31), candidates=3, max_tokens=12, stop_ids=())
    told = run_to_end(core, request)["r"]
    assert {len(tokens) for tokens in told.tokens.values()} == {12}
    times = computed(runner, request)
    assert times[0] == [2] * ORIGINAL + [1] * 8
    for candidate in (1, 2):
        assert times[candidate] == [0] * 20 + [2] * 4 + [1] * 8, "five blocks of the prompt were found, both times"


def test_prefixes_of_short_and_long_sequences_are_kept_apart() -> None:
    core, _ = make_core(info=ROOMY)
    short = make_request("short", range(10, 30), max_tokens=1, stop_ids=())
    long = [make_request(name, range(10, 40), max_tokens=1, stop_ids=()) for name in ("long", "again")]
    cached = {}
    for request in (short, long[0], long[1], make_request("other", range(10, 30), max_tokens=1)):
        done = run_to_end(core, request)[request.id].done
        assert done is not None
        cached[request.id] = done.cached_tokens
    assert cached == {"short": 0, "long": 0, "again": 28, "other": 16}


def test_no_salt_of_a_tenant_reaches_the_other_kind() -> None:
    """Salts are clients' texts: whatever they are, blocks of short and of long sequences have different keys."""
    found: set[bytes] = set()
    for salt in ("", "s", "long", "\0long", "s\0long"):
        for is_long in (False, True):
            keys: list[bytes] = []
            extend_keys(keys, 1, [1, 2], 2, salt, is_long=is_long)
            found.update(keys)
    assert len(found) == 10


def one_key_for_both(*given: Any, is_long: bool) -> None:
    extend_keys(*given)


def test_the_runner_notices_one_key_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_memory, "extend_keys", one_key_for_both)
    core, _ = make_core(info=ROOMY)
    run_to_end(core, make_request(prompt=range(10, 30), max_tokens=1))
    with pytest.raises(WrongPage, match="another content"):
        run_to_end(core, make_request(prompt=range(10, 40), max_tokens=1))


@pytest.mark.parametrize("ahead", [False, True])
def test_the_runner_notices_who_does_not_begin_again(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceMemory, "has_outgrown", lambda memory, sequence: False)
    core, _ = make_core(info=ROOMY, ahead=ahead)
    with pytest.raises(WrongPage, match="as if shorter"):
        run_to_end(core, make_request(prompt=range(10, 20), max_tokens=30, stop_ids=()))


def test_where_the_blocks_are_gone_the_youngest_gives_way() -> None:
    """Candidates share the blocks of their prompt until they begin again, each with blocks of its own."""
    info = model_info(num_blocks=10, max_context=40, original_context=ORIGINAL)
    request = make_request(prompt=range(10, 31), candidates=3, max_tokens=12, stop_ids=())
    core, runner = make_core(info=info)
    told = run_to_end(core, request)["r"]
    assert core.stats().preemptions
    roomy, _ = make_core(info=ROOMY)
    assert told.tokens == run_to_end(roomy, request)["r"].tokens
    assert max(computed(runner, request)[0]) == 2, "the oldest is never preempted"


@settings(max_examples=examples(25))
@given(
    st.lists(st.tuples(st.integers(1, 44), st.integers(1, 3), st.integers(1, 30), st.booleans()), max_size=6),
    st.integers(0, 20),
    st.sampled_from([None, 0, 3]),
    st.sampled_from([None, 0, 4]),
    st.integers(1, 44),
)
def test_whoever_crosses_answers_as_alone(
    plan: list[tuple[int, int, int, bool]], spare: int, redraws: int | None, snapshots: int | None, original: int
) -> None:
    """Prompts and candidates around the limit, some with a grammar, in pools that force preemptions."""
    requests = [
        make_request(f"r{n}", range(10, 10 + length), candidates=candidates, max_tokens=tokens, seed=n % 2, **more)
        for n, (length, candidates, tokens, bound) in enumerate(plan)
        for more in ([{"grammar": "9"}] if bound else [{}])
    ]

    def told_by(info_blocks: int, together: bool) -> dict[str, Told]:
        info = model_info(info_blocks, 4, 48, snapshots, original_context=original)
        sampler = DigestSampler(redraws=redraws or 0)
        core, _ = make_core(sampler, info=info, grammars=LowGrammars(), ahead=redraws is not None, state_stride=8)
        if together:
            return run_to_end(core, *requests)
        return {name: told for request in requests for name, told in run_to_end(core, request).items()}

    found, expected = told_by(12 + spare, together=True), told_by(256, together=False)
    for name, told in expected.items():
        assert (found[name].tokens, found[name].reasons) == (told.tokens, told.reasons)
