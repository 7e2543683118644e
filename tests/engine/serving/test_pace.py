"""How large a piece of a prompt may be, by measured times."""

from __future__ import annotations

from moesaic.engine.serving.pace import MIN_CHUNK, Pace


def measured(decode: float, *chunks: tuple[int, float]) -> Pace:
    """48 layers; chunks of so many tokens took so many seconds per layer."""
    pace = Pace(48, 2048)
    for _ in range(5):
        pace.decoded(decode)
    for num_tokens, seconds in chunks:
        pace.advanced(num_tokens, 4, 4 * seconds)
    return pace


def test_nobody_waits() -> None:
    assert (Pace(48, 2048).chunk(False), Pace(48, 2048).layers(2048, False)) == (2048, 48)


def test_layers_fill_the_time_of_a_decode_step() -> None:
    pace = measured(0.1, (2048, 0.03))
    assert (pace.chunk(True), pace.layers(2048, True)) == (2048, 3)
    assert measured(0.1, (2048, 1e-4)).layers(2048, True) == 48


def test_a_chunk_shrinks_until_a_layer_fits_and_grows_again() -> None:
    pace = measured(0.1, (2048, 0.4))
    assert pace.chunk(True) < 2048
    assert pace.layers(2048, True) == 1  # what is on its way goes on
    for _ in range(3):
        pace.advanced(512, 1, 0.08)
    assert pace.chunk(True) == 512  # twice as many take at most twice as long: 0.16
    for _ in range(6):
        pace.advanced(512, 1, 0.02)
    assert pace.chunk(True) == 2048


def test_what_is_known_of_another_size_is_brought_in_line() -> None:
    """A short prompt was measured where attention was cheap; long ones show that this has changed."""
    pace = measured(0.1, (64, 0.01))
    assert pace.chunk(True) == 1024  # 16 times as many take 0.16 at worst: a trial
    for _ in range(4):
        pace.advanced(512, 1, 0.3)
    assert pace.chunk(True) <= 256


def test_a_chunk_is_not_cut_where_that_saves_no_time() -> None:
    """Layers take 5 ms for 128 tokens and 7 ms for 1,024: a decode step of 4 ms is exceeded in any case."""
    pace = measured(0.004, (128, 0.005), (1024, 0.007))
    assert (pace.chunk(True), pace.layers(1024, True)) == (1024, 1)
    assert measured(0.004, (128, 0.005), (1024, 0.035)).chunk(True) < 128  # here it does
    pace = measured(0.004, (128, 0.005))
    assert pace.chunk(True) == 64  # nobody knows yet
    pace.advanced(64, 1, 0.0049)
    assert pace.chunk(True) == 1024  # a straight line, which is believed for eight times as many tokens
    assert measured(0.004, (16, 0.005)).chunk(True) == MIN_CHUNK


def test_what_is_known_is_of_the_tokens_that_there_were() -> None:
    """And not of the next power of two: 640 tokens at 5.5 ms a layer are four layers in 20 ms, not two."""
    pace = measured(0.020, (640, 0.0055))
    assert [pace.layers(count, True) for count in (384, 640, 1280)] == [4, 4, 2]


def test_a_layer_that_takes_nearly_half_a_step_goes_twice() -> None:
    assert measured(0.012, (640, 0.0063)).layers(640, True) == 2


def test_all_sizes_change_as_one_does() -> None:
    """Attention grows with the prompt: what was half of it before is half of it now."""
    pace = measured(0.02, (64, 0.01), (128, 0.02))
    for _ in range(6):
        pace.advanced(64, 1, 0.02)
    assert 0.035 < pace._layer(128) < 0.041


def test_nothing_is_known_yet() -> None:
    pace = Pace(48, 2048)
    assert (pace.chunk(True), pace.layers(16, True)) == (MIN_CHUNK, 1)
    pace.decoded(0.1)
    assert pace.chunk(True) == MIN_CHUNK


def test_chunks_never_get_smaller_than_that() -> None:
    assert measured(0.001, (2048, 4.0)).chunk(True) == MIN_CHUNK


def test_decoding_that_prefill_slows_down_leaves_less_for_prefill() -> None:
    pace = Pace(48, 2048)
    pace.advanced(64, 48, 48 * 0.001)
    for _ in range(40):
        pace.decoded(0.1, 4)
    assert pace.layers(64, True) == 48
    for _ in range(40):
        pace.decoded(0.14, 3, alone=False)  # of 200 ms there are 60 left
    pace.advanced(64, 1, 0.02)
    pace.advanced(64, 1, 0.02)
    assert 0.05 < pace._allowed() < 0.0601
    for _ in range(40):
        pace.decoded(0.3, 4, alone=False)  # twice the usual is over: prompts go on all the same
    assert abs(pace._allowed() - 0.075) < 1e-9
    for _ in range(40):
        pace.decoded(0.3, 9, alone=False)  # what is usual for so many is not known
    assert abs(pace._allowed() - 0.3) < 1e-9
