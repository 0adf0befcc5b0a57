"""Stored episodes outlive the detector that found them: one trouble stays one episode."""

from __future__ import annotations

from dataclasses import replace

from enova_coordinator.core.episode import EpisodeState, EvidenceSeries
from enova_coordinator.core.episode_ledger import ABANDON_AFTER_S, UPDATE_EVERY_S, EpisodeLedger, FoundChange
from enova_coordinator.core.episode_ledger import EpisodeWrite as Write
from enova_recommender.detection.causes import Cause, SuggestedAction
from enova_recommender.detection.episodes import Change, Episode, Root, Scope
from enova_recommender.detection.verdicts import Contribution
from enova_recommender.types import VerdictKind

REPLICA = "deployments/d/replicas/v-0"
SERIES = (EvidenceSeries(object=REPLICA, feature="step_s", start_s=900.0, step_s=5.0, values=(0.1, 0.2)),)


def wall_s(model_s: float) -> float:
    """A model clock ten times as fast as the wall's."""
    return 1_000_000.0 + model_s / 10.0


def found(
    id_: str = "a", *, name: str = REPLICA, kind: VerdictKind = VerdictKind.DEGRADED, at_s: float = 1000.0
) -> Episode:
    return Episode(
        id=id_, root=Root(scope=Scope.REPLICA, name=name), kind=kind, causes=(Cause.SLOW,), members=frozenset({name}),
        since_s=at_s - 20.0, opened_s=at_s, seen_s=at_s, closed_s=None, score=0.7, confidence=0.5,
        action=SuggestedAction.REPLACE,
        contributions=(Contribution(feature="step_time_ratio", value=2.6, threshold=1.3),),
    )  # fmt: skip


def told(change: Change, episode: Episode, series: tuple[EvidenceSeries, ...] = SERIES) -> FoundChange:
    return FoundChange(change=change, episode=episode, member_count=len(episode.members), series=series)


def ledger(*stored: Write, now_s: float = 0.0) -> EpisodeLedger:
    return EpisodeLedger([each.episode for each in stored], wall_s=wall_s, now_s=now_s)


def opened(book: EpisodeLedger, episode: Episode | None = None) -> Write:
    (write,) = book.take([told(Change.OPENED, episode or found())], now_s=1000.0, real_s=100.0)
    return write


def test_an_episode_opens_with_what_it_rests_on_in_times_of_the_wall() -> None:
    write = opened(ledger())
    episode = write.episode
    assert write.change is Change.OPENED
    assert episode.name.startswith("episodes/0000001000100000-")  # milliseconds, so that names sort by age
    assert (episode.object, episode.verdict, episode.causes) == (REPLICA, VerdictKind.DEGRADED, ("SLOW",))
    assert (episode.since_s, episode.open_time_s, episode.since_model_s) == (wall_s(980.0), wall_s(1000.0), 980.0)
    assert [(each.feature, each.contribution) for each in episode.findings] == [("step_time_ratio", 2.0)]
    assert episode.series == SERIES


def test_updates_are_written_now_and_then_and_the_end_at_once() -> None:
    book = ledger()
    name = opened(book).episode.name
    soon = book.take([told(Change.UPDATED, found())], now_s=1005.0, real_s=101.0)
    later = book.take([told(Change.UPDATED, found())], now_s=1100.0, real_s=100.0 + UPDATE_EVERY_S)
    ended = replace(found(), closed_s=1200.0, seen_s=1170.0)
    (end,) = book.take([told(Change.CLOSED, ended, series=())], now_s=1200.0, real_s=110.5)
    assert soon == []
    assert [each.change for each in later] == [Change.UPDATED]
    assert (end.change, end.episode.name, end.episode.state) == (Change.CLOSED, name, EpisodeState.CLOSED)
    assert end.episode.close_time_s == wall_s(1200.0)
    assert end.episode.series == SERIES  # what was measured stays, though the replica may be gone
    assert book.open == {}


def test_a_new_cause_is_written_at_once() -> None:
    book = ledger()
    opened(book)
    hung = replace(found(), causes=(Cause.HUNG, Cause.SLOW), action=SuggestedAction.EJECT)
    (write,) = book.take([told(Change.UPDATED, hung)], now_s=1005.0, real_s=101.0)
    assert (write.change, write.episode.causes) == (Change.UPDATED, ("HUNG", "SLOW"))
    assert write.episode.suggested_action == "EJECT"


def test_an_update_that_was_put_off_is_written_when_its_time_has_come() -> None:
    book = ledger()
    opened(book)
    graver = replace(found(), score=0.9, seen_s=1005.0)
    assert book.take([told(Change.UPDATED, graver)], now_s=1005.0, real_s=101.0) == []
    assert book.take([], now_s=1010.0, real_s=105.0) == []
    (late,) = book.take([], now_s=1050.0, real_s=100.0 + UPDATE_EVERY_S)
    assert (late.change, late.episode.score) == (Change.UPDATED, 0.9)
    assert book.take([], now_s=1150.0, real_s=200.0) == []


def test_what_was_put_off_ends_with_its_episode() -> None:
    book = ledger()
    opened(book)
    book.take([told(Change.UPDATED, replace(found(), score=0.9))], now_s=1005.0, real_s=101.0)
    (end,) = book.take([told(Change.CLOSED, replace(found(), closed_s=1040.0))], now_s=1040.0, real_s=102.0)
    assert end.change is Change.CLOSED
    assert book.take([], now_s=1150.0, real_s=200.0) == []


def test_what_opens_and_changes_in_one_answer_is_one_write_that_opens() -> None:
    changes = [told(Change.OPENED, found()), told(Change.UPDATED, replace(found(), score=0.9))]
    (write,) = ledger().take(changes, now_s=1000.0, real_s=100.0)
    assert (write.change, write.episode.score) == (Change.OPENED, 0.9)


def test_after_a_restart_the_same_trouble_goes_on_under_its_name() -> None:
    before = opened(ledger())
    book = ledger(before, now_s=1100.0)
    (write,) = book.take([told(Change.OPENED, found("b", at_s=1110.0))], now_s=1110.0, real_s=1.0)
    assert (write.change, write.episode.name) == (Change.UPDATED, before.episode.name)
    assert (write.episode.open_time_s, write.episode.since_model_s) == (wall_s(1000.0), 980.0)
    assert book.take([], now_s=1100.0 + 2 * ABANDON_AFTER_S, real_s=500.0) == []


def test_another_trouble_of_the_same_replica_is_another_episode() -> None:
    before = opened(ledger())
    other = found("b", kind=VerdictKind.OVERLOADED, at_s=1110.0)
    (write,) = ledger(before, now_s=1100.0).take([told(Change.OPENED, other)], now_s=1110.0, real_s=1.0)
    assert write.change is Change.OPENED
    assert write.episode.name != before.episode.name


def test_what_nobody_sees_again_after_a_restart_ends_where_it_was_last_seen() -> None:
    before = opened(ledger())
    book = ledger(before, now_s=1100.0)
    assert book.take([], now_s=1100.0 + ABANDON_AFTER_S - 1.0, real_s=1.0) == []
    (write,) = book.take([], now_s=1100.0 + ABANDON_AFTER_S, real_s=2.0)
    assert (write.change, write.episode.close_time_s) == (Change.CLOSED, wall_s(1000.0))
    assert book.open == {}


def test_a_detector_that_begins_anew_is_as_after_a_restart() -> None:
    book = ledger()
    name = opened(book).episode.name
    book.detached(now_s=1050.0)
    (write,) = book.take([told(Change.OPENED, found("b", at_s=1060.0))], now_s=1060.0, real_s=200.0)
    assert (write.change, write.episode.name) == (Change.UPDATED, name)


def test_a_change_of_what_was_never_told_is_passed_over() -> None:
    changes = [told(Change.UPDATED, found("lost")), told(Change.CLOSED, replace(found("lost"), closed_s=1.0))]
    assert ledger().take(changes, now_s=1000.0, real_s=1.0) == []
