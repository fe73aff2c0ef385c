import pytest

from embed.preparation import copies


def test_texts_that_differ_only_in_white_space_are_the_same():
    assert copies.digest("def f(x):\n    return x") == copies.digest("def f(x): return\tx")
    assert copies.digest("def f(x): return x") != copies.digest("def f(y): return y")


def test_the_first_of_equal_items_stays_and_the_others_are_counted():
    assert copies.deduplicate(["a b", "ab", "c", "a  b"], copies.digest) == (["a b", "c"], 2)


def test_items_with_a_held_out_key_are_dropped_and_counted():
    assert copies.decontaminate(["ab", "cd", "ce"], list, {"b", "e"}) == (["cd"], 2)


@pytest.mark.parametrize("position", [0, 7, 2**20 - 40, 2**20 + 5])
def test_a_needle_is_found_at_any_position_of_a_text(position):
    needle = "def held_out(a, b):\n    return a * b + 17 - a**2"
    text = "x" * position + "def held_out(a,b): return a*b+17-a**2" + "y" * 100
    other = "def other(a, b):\n    return a * b + 18 - a  # absent"
    assert copies.contained([other, needle], ["nothing", text]) == {1}


def test_a_needle_is_not_found_across_two_texts():
    needle = "abcdefghijklmnopqrstuvwxyz0123456789"
    assert copies.contained([needle], [needle[:20], needle[20:]]) == set()


def test_a_needle_is_not_found_if_only_its_window_occurs():
    needle = "abcdefghijklmnopqrstuvwxyz0123456789"
    assert copies.contained([needle], [needle[:34] + "!!"]) == set()


def test_too_short_needles_are_refused():
    with pytest.raises(ValueError, match="needle 1 has 5 characters"):
        copies.contained(["x" * 40, "a b cde"], ["text"])
