"""Medians and ratios over rounds, and what each scenario makes of its measurements."""

from __future__ import annotations

import pytest
from support.measurements import found, measured

from server.bench.results.findings import Results, quotient
from server.bench.results.measure import Spread
from server.bench.scenarios import SCENARIOS


def test_ratios_are_those_of_the_same_round() -> None:
    speeds = {"castor": (10, 40, 20), "llama.cpp": (20, 20, 10)}
    results = Results(
        [measured(name, r, "1 stream", tokens) for name, row in speeds.items() for r, tokens in enumerate(row)]
    )
    (ratio,) = [ratio for ratio in results.ratios() if ratio.number == "output_tokens_per_second"]
    assert (ratio.peer, ratio.load, ratio.value) == ("llama.cpp", "1 stream", Spread(2.0, 0.5, 2.0, 3))


def test_loads_with_rates_of_their_own_have_no_ratio() -> None:
    ours, theirs = measured("castor", 0, "0.5 of saturation"), measured("llama.cpp", 0, "0.5 of saturation")
    ours.rate, theirs.rate = 2.0, 1.0
    assert Results([ours, theirs]).ratios() == []
    theirs.rate = 2.0
    assert len(Results([ours, theirs]).ratios()) == 4


def test_totals_are_medians_and_the_highest_peak() -> None:
    results = Results([measured("castor", number, "1 stream", tokens) for number, tokens in enumerate((1, 9, 2))])
    (total,) = results.totals()
    assert total.numbers["output_tokens_per_second"] == Spread(2, 1, 9, 3)
    assert (total.peak_rss, total.last_pss, total.counted_by) == (20, 12, "usage")
    assert total.most_other_cores == pytest.approx(0.2)


def test_a_round_that_lacks_a_measurement_is_left_out() -> None:
    results = Results([measured("castor", 0, "a"), measured("castor", 1, "b")])
    assert results.each_round("castor", lambda loads: loads["a"].round) == Spread(0, 0, 0, 1)
    assert results.each_round("castor", lambda loads: loads["c"].round) is None


def test_quotients() -> None:
    assert quotient(1.0, 4.0) == 0.25
    assert quotient(1.0, 0.0) is quotient(None, 1.0) is quotient(1.0, None) is None


def test_goodput_at_each_share() -> None:
    findings = found(
        SCENARIOS["R3"], measured("castor", 0, "0.5 of saturation"), measured("castor", 0, "1 of saturation", ttft=3)
    )
    assert findings["goodput at 0.5 of saturation", "castor"].median == 1.0
    assert findings["goodput at 1 of saturation", "castor"].median == 0.0
    assert findings["kept both limits at 0.5 of saturation", "castor"].median == 1.0


def test_schemas_against_free_text() -> None:
    findings = found(SCENARIOS["R5"], measured("castor", 0, "free 16", 100), measured("castor", 0, "schema 16", 95))
    assert findings == {("schema against free text, 16 streams", "castor"): Spread(0.95, 0.95, 0.95, 1)}


def test_what_cancelling_leaves() -> None:
    half = measured("castor", 0, "half cancelled", itl=0.2)
    half.numbers |= {"kv_blocks_held": 0.0, "seconds_until_free": 0.1}
    findings = found(SCENARIOS["R6"], measured("castor", 0, "undisturbed"), half)
    assert findings["KV blocks held afterwards", "castor"].median == 0
    assert findings["p99 ITL of the others", "castor"].median == pytest.approx(2.0)


def test_prefixes_and_intrusions() -> None:
    first, second = measured("castor", 0, "first", ttft=1.0), measured("castor", 0, "second", ttft=0.1)
    assert found(SCENARIOS["prefix"], first, second)["TTFT first / second", "castor"].median == pytest.approx(10.0)
    intruded = measured("castor", 0, "intruded", itl=0.2)
    intruded.numbers |= {
        "itl_p99_beside": 0.25,
        "itl_p99_alone": 0.1,
        "intruder_ttft": 4.0,
        "intruder_prompt_tokens": 4100,
    }
    findings = found(SCENARIOS["intrusion"], measured("castor", 0, "alone"), intruded)
    assert findings["p99 ITL while the long prompt is computed", "castor"].median == pytest.approx(2.5)
    assert findings["p99 ITL of the whole load", "castor"].median == pytest.approx(2.0)
