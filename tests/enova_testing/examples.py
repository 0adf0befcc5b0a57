"""How many examples hypothesis tries of a property: all of them, or a share where a quick answer is wanted."""

from __future__ import annotations

import os

from hypothesis import settings

SHARE_VARIABLE = "ENOVA_TEST_EXAMPLES_SHARE"
COUNT_DEFAULT = 100         # hypothesis's own
COUNT_MIN = 5               # fewer would hardly leave the simplest example


def examples(count: int = COUNT_DEFAULT) -> settings:
    """Settings for a property that is tried on this many examples in a whole run; `make test-fast` asks for a share.

    No deadline for one example: how long it takes says more of the machine's load than of the code.
    """
    share = float(os.environ.get(SHARE_VARIABLE, "1"))
    return settings(max_examples=min(count, max(COUNT_MIN, round(count * share))), deadline=None)
