"""What is kept for calls that come again, and what is dropped for it."""

from emag_export.engines.repeats import CallKey, Repeats


def key(number: int) -> CallKey:
    return (("h", number),), (1, 2)


def test_something_is_made_when_a_call_comes_again_and_the_oldest_is_dropped_first() -> None:
    dropped: list[str] = []
    repeats: Repeats[str] = Repeats(2, dropped.append)

    def get(which: int) -> str | None:
        return repeats.get(key(which), lambda: f"for {which}, after dropping {len(dropped)}")

    assert [get(which) for which in (0, 1, 0, 0)] == [None, None, *["for 0, after dropping 0"] * 2]
    assert get(1) == "for 1, after dropping 0"
    assert get(0) == "for 0, after dropping 0"
    assert [get(2), get(2)] == [None, "for 2, after dropping 1"]
    assert dropped == ["for 1, after dropping 0"], "which was unused for longer than 0"
    assert (key(0) in repeats, key(1) in repeats) == (True, False)
    assert get(1) is None, "what was dropped starts anew"


def test_nothing_is_kept_without_a_key_or_a_limit() -> None:
    assert [Repeats[int](2).get(None, lambda: 1) for _ in range(2)] == [None, None]
    none: Repeats[int] = Repeats(0)
    assert [none.get(key(0), lambda: 1) for _ in range(3)] == [None] * 3


def test_calls_seen_once_are_forgotten_oldest_first() -> None:
    repeats: Repeats[int] = Repeats(1)
    for number in range(9):  # eight are remembered for each that is kept
        repeats.get(key(number), lambda: 1)
    assert repeats.get(key(8), lambda: 8) == 8
    assert repeats.get(key(0), lambda: 0) is None
    assert repeats.get(key(2), lambda: 2) == 2
