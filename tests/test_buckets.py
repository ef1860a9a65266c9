"""How parameters are divided into buckets: limits hold, nothing is lost or moved, blocks are not cut without need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspass.passes.buckets import FEWEST_BYTES, Item, block_of, pack

MB = 10**6


def item(name: str, size: int, kind: object = None) -> Item:
    return Item((name,), (size,), size // 4, kind)


def model(blocks: int, size: int) -> list[Item]:
    """An embedding, blocks of three parameters, a head; in order of use."""
    parts = [item(f"layers.{i}.{part}", size // 3) for i in range(blocks) for part in ("a", "b", "c")]
    return [item("embed", size // 4), *parts, item("head", size // 4)]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.7.mlp.up.weight", ("model.layers", 7)),
        ("0.weight", ("", 0)),
        ("encoder.block.3.layer.1.norm.weight", ("encoder.block", 3)),
        ("conv2.weight", None),
        ("parameter_0_1", None),
    ],
)
def test_a_parameters_block_is_the_first_number_in_its_name(name: str, block: object) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize("backward", [False, True])
def test_every_bucket_holds_one_block_or_as_many_as_the_others(backward: bool) -> None:
    for blocks, size, each in ((6, 9 * MB, 1), (24, 9 * MB, 3), (24, 900 * MB, 1)):
        items = model(blocks, size)
        items = items[::-1] if backward else items
        found = [{block_of(n) for i in bucket for n in items[i].names} - {None} for bucket in pack(items)]
        held = [sorted(i for _, i in bucket) for bucket in found if bucket]  # type: ignore[misc]
        if size <= 512 * MB:
            assert sorted(held) == [list(range(i, i + each)) for i in range(0, blocks, each)]
        else:  # too large to travel whole: each is cut alike
            assert held.count([0]) == 3
            assert all(held.count([i]) == held.count([1]) for i in range(1, blocks))


@given(
    st.lists(
        st.builds(
            item,
            st.sampled_from(["embed", "head", *(f"a.{i}.w" for i in range(4)), *(f"b.{i}.w" for i in range(3))]),
            st.integers(0, 40 * MB),
            st.integers(0, 1),
        )
    ),
    st.none() | st.integers(1, 60 * MB),
    st.none() | st.integers(1, 10 * MB),
)
def test_limits_hold_and_the_order_stays(items: list[Item], bucket_bytes: int | None, max_elements: int | None) -> None:
    buckets = pack(items, bucket_bytes, max_elements)
    assert [i for bucket in buckets for i in bucket] == list(range(len(items)))
    for bucket in buckets:
        assert len({items[i].kind for i in bucket}) == 1
        if len(bucket) > 1:
            assert bucket_bytes is None or sum(items[i].bytes for i in bucket) <= bucket_bytes
            assert max_elements is None or sum(items[i].elements for i in bucket) <= max_elements


@given(st.lists(st.integers(1, FEWEST_BYTES // 8), max_size=8))
def test_small_models_travel_whole(sizes: list[int]) -> None:
    assert len(pack([item(f"fc{i}x", size) for i, size in enumerate(sizes)])) == (1 if sizes else 0)
