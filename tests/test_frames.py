"""Room for frames: no call maps memory, wherever in a deep recursion it is made."""

import resource
import sys
from collections.abc import Callable

import pytest

from dspass.runtime.frames import with_room

#: Calls at one place, and places of a recursion: 16 KiB hold fewer frames than there are.
CALLS, DEEP = 500, 300


def most_faults(wrap: Callable[[Callable[[], int]], Callable[[], int]]) -> int:
    """Of pages that had to be mapped for some calls, at the place of a recursion where they are the most."""

    def leaf() -> int:
        return 1

    def descend(left: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(CALLS):
            leaf()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return max(faults, descend(left - 1)) if left else faults

    return wrap(lambda: descend(DEEP))()


def test_no_call_of_a_deep_recursion_maps_memory() -> None:
    assert most_faults(with_room) < CALLS // 10


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="later releases of CPython 3.13 and 3.14 keep a chunk")
def test_without_room_some_do() -> None:
    assert most_faults(lambda f: f) >= CALLS


def test_arguments_answers_and_names_go_through() -> None:
    @with_room
    def add(a: int, *, b: int = 1) -> int:
        """Their sum."""
        return a + b

    assert add(2, b=3) == 5
    assert (add.__name__, add.__doc__) == ("add", "Their sum.")
    with pytest.raises(TypeError, match="missing"):
        add()  # type: ignore[call-arg]
