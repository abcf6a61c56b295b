"""What is taken of a session's metadata, which a stranger may have written."""

from typing import Any

import pytest

from shared.wishes import LONGEST_VALUE, Wishes, unknown_keys, wishes_in


def test_the_known_keys_are_taken_and_all_else_is_left() -> None:
    metadata = {
        "sandbox-fleet.size": " large ",
        "sandbox-fleet.archive": "s3://bucket/key.tar.gz",
        "sandbox-fleet.git": "https://example.com/a.git#main",
        "size": "huge",
        "sandbox-fleet.siz": "huge",
    }
    assert wishes_in(metadata) == Wishes(
        size="large", archive="s3://bucket/key.tar.gz", git="https://example.com/a.git#main"
    )
    assert unknown_keys(metadata) == ["sandbox-fleet.siz"]


@pytest.mark.parametrize("value", ["", " ", None, 7, {"name": "large"}, "a\nb", "\x00", "x" * (LONGEST_VALUE + 1)])
def test_a_value_that_is_no_short_line_is_as_good_as_absent_and_named(value: Any) -> None:
    assert wishes_in({"sandbox-fleet.size": value}) == Wishes()
    assert unknown_keys({"sandbox-fleet.size": value}) == ["sandbox-fleet.size"]
