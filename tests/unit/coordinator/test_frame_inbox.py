"""Frames that wait for detection are bounded by node and in all, and what goes is counted."""

from __future__ import annotations

import pytest

from enova_coordinator import frame_inbox
from enova_coordinator.frame_inbox import FRAMES_PER_NODE_MAX, FrameInbox


def inbox(now_s: float = 1000.0) -> FrameInbox:
    return FrameInbox(now_s=lambda: now_s, old_s=30.0)


def test_each_node_s_frames_come_in_order_with_the_time_at_which_they_came() -> None:
    box = inbox()
    for data in (b"1", b"2"):
        box.put("nodes/a", 999.0, data)
    box.put("nodes/b", 999.0, b"3")
    taken = box.take()
    assert [(each.node, each.data) for each in taken] == [("nodes/a", b"1"), ("nodes/a", b"2"), ("nodes/b", b"3")]
    assert {each.received_s for each in taken} == {1000.0}
    assert box.take() == ()
    assert len(box) == 0


def test_over_the_bound_the_oldest_of_the_node_go_and_are_counted() -> None:
    box = inbox()
    for number in range(FRAMES_PER_NODE_MAX + 3):
        box.put("nodes/a", 999.0, bytes([number]))
    box.put("nodes/b", 999.0, b"b")
    taken = box.take()
    assert len(taken) == FRAMES_PER_NODE_MAX + 1
    assert taken[0].data == bytes([3])
    assert box.dropped == {"full": 3}


def test_a_backfill_is_not_for_it() -> None:
    box = inbox()
    box.put("nodes/a", 900.0, b"old")
    assert box.take() == ()
    assert box.dropped == {"old": 1}


def test_all_nodes_together_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_inbox, "BYTES_MAX", 100)
    box = inbox()
    for node in range(20):
        box.put(f"nodes/{node}", 999.0, b"x" * 10)
    assert len(box) == 10
    box.put("nodes/0", 999.0, b"y" * 10)  # a node gives way to itself first
    assert box.take()[0].data == b"y" * 10
    assert box.dropped == {"full": 11}


def test_what_is_too_much_for_one_round_waits_for_the_next_and_no_node_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frame_inbox, "TAKE_BYTES_MAX", 30)
    box = inbox()
    for node in range(5):
        box.put(f"nodes/{node}", 999.0, b"x" * 10)
    first = [each.node for each in box.take()]
    for node in range(5):
        box.put(f"nodes/{node}", 999.0, b"x" * 10)
    second = [each.node for each in box.take()]
    assert first == ["nodes/0", "nodes/1", "nodes/2"]
    assert set(second) >= {"nodes/3", "nodes/4"}
