"""Terms that are obeyed, and news that are worth telling."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enova_agent.core.model import ReplicaState, ReplicaView
from enova_agent.core.node import NodeStatus
from enova_agent.core.term import TermVerdict, judge_term

VIEW = ReplicaView(replica="deployments/d/replicas/r", uid="u", state=ReplicaState.READY)


@pytest.mark.parametrize(
    ("term", "verdict"),
    [
        (6, TermVerdict.REFUSE),
        (7, TermVerdict.OBEY),
        (8, TermVerdict.REMEMBER_THEN_OBEY),
        (2**62, TermVerdict.REMEMBER_THEN_OBEY),
        (0, TermVerdict.REFUSE),
        (-1, TermVerdict.REFUSE),
    ],
)
def test_a_lower_term_is_refused_and_a_higher_one_remembered_first(term: int, verdict: TermVerdict) -> None:
    assert judge_term(term, highest=7) is verdict


def test_a_negative_term_is_refused_whatever_was_seen() -> None:
    assert judge_term(-1, highest=-1) is TermVerdict.REFUSE


def test_requests_that_come_and_go_are_no_news_but_where_a_replica_drains() -> None:
    status = NodeStatus(views=(VIEW,))
    assert not NodeStatus(views=(replace(VIEW, in_flight=5),)).differs(status)
    draining = replace(VIEW, state=ReplicaState.DRAINING, in_flight=5)
    assert NodeStatus(views=(replace(draining, in_flight=4),)).differs(NodeStatus(views=(draining,)))


@pytest.mark.parametrize(
    "changed",
    [
        NodeStatus(views=(VIEW,), assignment_revision=1),
        NodeStatus(views=(VIEW,), routes_revision=1),
        NodeStatus(views=(VIEW,), ingress_connected=True),
        NodeStatus(views=(replace(VIEW, in_routing=False),)),
        NodeStatus(views=(replace(VIEW, reason="why"),)),
        NodeStatus(),
    ],
)
def test_everything_else_is_news(changed: NodeStatus) -> None:
    assert changed.differs(NodeStatus(views=(VIEW,)))
