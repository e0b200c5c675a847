from __future__ import annotations

from dreambooth.serving.contract.engine_status import EngineStatus


def test_counters_are_summed_up_and_gauges_are_those_of_the_last_engine() -> None:
    ended = EngineStatus(
        queued_pictures=1,
        running_rows=2,
        undecoded=3,
        calls_total=10,
        pictures_total=20,
        out_of_memory_total=30,
        dropped_lines_total=40,
        seconds_per_call=((1, 0.5),),
        seconds_per_decode=0.5,
        rss_bytes=1000,
    )
    now = EngineStatus(
        queued_pictures=4,
        running_rows=5,
        undecoded=6,
        calls_total=1,
        pictures_total=2,
        out_of_memory_total=3,
        dropped_lines_total=4,
        seconds_per_call=((2, 0.25),),
        seconds_per_decode=0.25,
        rss_bytes=2000,
    )
    assert now.after(ended) == EngineStatus(
        queued_pictures=4,
        running_rows=5,
        undecoded=6,
        calls_total=11,
        pictures_total=22,
        out_of_memory_total=33,
        dropped_lines_total=44,
        seconds_per_call=((2, 0.25),),
        seconds_per_decode=0.25,
        rss_bytes=2000,
    )
