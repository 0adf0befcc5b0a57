"""Desired beside running: which changes, and that they end."""

from __future__ import annotations

from dataclasses import replace

from enova_agent.core.assignment import Drain, Replace, Restart, Resume, Running, Start, Stop, Update, converge
from enova_agent.core.model import Assignment, Claim, Desired, MemberSpec

A = MemberSpec(replica="deployments/d/replicas/a", uid="1", model="m", configuration={"max_num_seqs": 8})
B = MemberSpec(replica="deployments/d/replicas/b", uid="2", model="m")


def assigned(*members: MemberSpec) -> Assignment:
    return Assignment(revision=1, term=1, members=members)


def test_what_is_assigned_and_absent_is_started() -> None:
    assert converge(assigned(A, B), {}) == (Start(spec=A), Start(spec=B))


def test_what_runs_as_assigned_is_left_alone() -> None:
    assert converge(assigned(A), {A.replica: Running(spec=A)}) == ()


def test_what_is_not_assigned_is_stopped_once() -> None:
    change = Stop(replica=A.replica, drain_timeout_s=A.drain_timeout_s)
    assert converge(assigned(), {A.replica: Running(spec=A)}) == (change,)
    assert converge(assigned(), {A.replica: Running(spec=A, stopping=True)}) == (change,)  # drained: now forget it
    assert converge(assigned(), {A.replica: Running(spec=A, stopping=True, leaving=True)}) == ()


def test_a_drain_is_asked_for_once_and_can_be_taken_back() -> None:
    draining = replace(A, desired=Desired.DRAIN)
    assert converge(assigned(draining), {A.replica: Running(spec=A)}) == (Drain(spec=draining),)
    assert converge(assigned(draining), {A.replica: Running(spec=draining, stopping=True)}) == ()
    assert converge(assigned(A), {A.replica: Running(spec=draining, stopping=True)}) == (Resume(spec=A),)


def test_another_configuration_model_or_gpu_needs_a_new_process_after_the_old_is_gone() -> None:
    for wanted in (
        replace(A, configuration={"max_num_seqs": 16}),
        replace(A, model="n"),
        replace(A, uid="9"),
        replace(A, claims=(Claim(gpu_uuid="GPU-1"),)),
        replace(A, served_names=("x",)),
    ):
        change = Replace(replica=A.replica, drain_timeout_s=A.drain_timeout_s)
        assert converge(assigned(wanted), {A.replica: Running(spec=A)}) == (change,)
        assert converge(assigned(wanted), {A.replica: Running(spec=A, stopping=True, leaving=True)}) == ()
        assert converge(assigned(wanted), {}) == (Start(spec=wanted),)


def test_what_needs_no_new_process_is_updated_in_place() -> None:
    wanted = replace(A, queue_limit=3, drain_timeout_s=5.0)
    assert converge(assigned(wanted), {A.replica: Running(spec=A)}) == (Update(spec=wanted),)


def test_a_grown_nonce_restarts_once() -> None:
    wanted = replace(A, restart_nonce=1)
    assert converge(assigned(wanted), {A.replica: Running(spec=A)}) == (Restart(spec=wanted),)
    assert converge(assigned(wanted), {A.replica: Running(spec=wanted)}) == ()
