"""VerdictService: what the detector says of deployments and replicas, and the episodes that its verdicts make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from enova.v1 import decision_service_pb2, verdict_service_pb2, verdict_service_pb2_grpc
from enova_common.errors import InvalidField, NotFound
from enova_coordinator.core.episode import Episode, EpisodeLabel
from enova_coordinator.core.verdicts import Verdict, of_replica
from enova_coordinator.service import names, paging
from enova_coordinator.service.leading import Chair, Leading, actor
from enova_coordinator.service.watching import watch
from enova_coordinator.service.writes import Writes, call, check_etag
from enova_coordinator.service_log import in_turns
from enova_coordinator.store import Store, codec
from enova_recommender.detection.causes import Cause

Context = Any  # grpc.aio.ServicerContext of whatever messages
ORDER = verdict_service_pb2.ListEpisodesRequest
WATCH_PERIOD_S = 0.5               # real time
AT_ONCE = 50                       # episodes that are read before all else has its turn: 12 ms
_LABELS = {
    verdict_service_pb2.Episode.LABEL_UNSPECIFIED: EpisodeLabel.NONE,
    verdict_service_pb2.Episode.LABEL_TRUE: EpisodeLabel.TRUE,
    verdict_service_pb2.Episode.LABEL_FALSE: EpisodeLabel.FALSE,
}


class VerdictService(verdict_service_pb2_grpc.VerdictServiceServicer):
    """See verdict_service.proto. `now_s` is the wall clock."""

    def __init__(self, store: Store, chair: Chair, writes: Writes, *, now_s: Callable[[], float]) -> None:
        self._store = store
        self._chair = chair
        self._writes = writes
        self._now_s = now_s

    async def ListVerdicts(  # noqa: N802
        self, request: verdict_service_pb2.ListVerdictsRequest, context: Context
    ) -> verdict_service_pb2.ListVerdictsResponse:
        """A page of the verdicts that stand now."""
        actor(context)
        standing = _standing(self._chair.leading(), request.object)
        taken, token = paging.page(
            sorted(standing, key=lambda verdict: verdict.object),
            collection="verdicts",
            size=request.page_size,
            token=request.page_token,
            key=lambda verdict: verdict.object,
        )
        return verdict_service_pb2.ListVerdictsResponse(
            verdicts=[_message(verdict) for verdict in taken], next_page_token=token
        )

    async def WatchVerdicts(  # noqa: N802
        self, request: verdict_service_pb2.WatchVerdictsRequest, context: Context
    ) -> AsyncIterator[verdict_service_pb2.WatchVerdictsResponse]:
        """What stands, then what changes, looked at as often as steps may end; figures of one verdict move with it."""
        actor(context)
        told: dict[str, Verdict] | None = None
        while True:
            now = {verdict.object: verdict for verdict in _standing(self._chair.leading(), request.object)}
            known = told or {}
            changed = [verdict for name, verdict in now.items() if known.get(name) != verdict]
            ended = [name for name in known if name not in now]
            if told is None or changed or ended:
                yield verdict_service_pb2.WatchVerdictsResponse(
                    changed=[_message(verdict) for verdict in changed], ended=ended
                )
            told = now
            await asyncio.sleep(WATCH_PERIOD_S)

    async def GetEpisode(  # noqa: N802
        self, request: verdict_service_pb2.GetEpisodeRequest, context: Context
    ) -> verdict_service_pb2.Episode:
        """One episode."""
        actor(context)
        name = names.episode_name(request.name)
        entry = await self._store.get(codec.key(name))
        if entry is None:
            raise _no_episode(name)
        return episode_message(codec.decode_as(Episode, entry.value, key=entry.key))

    async def ListEpisodes(  # noqa: N802
        self, request: verdict_service_pb2.ListEpisodesRequest, context: Context
    ) -> verdict_service_pb2.ListEpisodesResponse:
        """A page of the episodes that are kept: newest first, or those first of which a label would teach most."""
        actor(context)
        entries, _ = await self._store.range(codec.prefix("episodes"))
        newest_first = in_turns(list(reversed(entries)), at_once=AT_ONCE)
        found = [codec.decode_as(Episode, entry.value, key=entry.key) async for entry in newest_first]
        state = verdict_service_pb2.Episode.State.Name(request.state).removeprefix("STATE_")
        wanted = [
            each
            for each in found
            if (not request.state or each.state.value == state) and _concerns(each, request.object)
        ]
        if request.order == ORDER.ORDER_UNCERTAIN:
            unlabelled = [each for each in wanted if each.label is EpisodeLabel.NONE and not each.label_cause]
            wanted = sorted(unlabelled, key=lambda each: each.doubt)
        size = paging.page_size(request.page_size)
        last = paging.decode_token("episodes", request.page_token)
        at = next((index + 1 for index, each in enumerate(wanted) if each.name == last), 0) if last else 0
        taken = wanted[at : at + size]
        more = len(wanted) > at + size
        return verdict_service_pb2.ListEpisodesResponse(
            episodes=[episode_message(each) for each in taken],
            next_page_token=paging.encode_token("episodes", taken[-1].name) if more else "",
        )

    async def WatchEpisodes(  # noqa: N802
        self, request: verdict_service_pb2.WatchEpisodesRequest, context: Context
    ) -> AsyncIterator[verdict_service_pb2.WatchEpisodesResponse]:
        """First the episodes as they are (or what changed since resume_revision), then every change."""
        actor(context)
        prefix = codec.prefix("episodes")
        async for batch in watch(self._store, Episode, prefix, resume_revision=request.resume_revision):
            yield verdict_service_pb2.WatchEpisodesResponse(
                revision=batch.revision,
                changed=[episode_message(each) for each in batch.changed],
                deleted=batch.deleted,
            )

    async def LabelEpisode(  # noqa: N802
        self, request: verdict_service_pb2.LabelEpisodeRequest, context: Context
    ) -> verdict_service_pb2.Episode:
        """Write what a person says of an episode."""
        by_whom = actor(context)
        name = names.episode_name(request.name)
        by = call("LabelEpisode", request)
        label = _LABELS[request.label]
        cause = _cause(request.cause)
        if label is EpisodeLabel.FALSE and cause:
            raise InvalidField("a false alarm has no cause", field="cause", remedy="give one of both")

        def edit(before: Episode | None) -> Episode:
            if before is None:
                raise _no_episode(name)
            check_etag(request.etag, before.etag, name)
            return replace(
                before, label=label, label_cause=cause, label_actor=by_whom, label_time_s=self._now_s()
            )

        if await self._writes.repeated(by) is not None:
            after = await self._writes.read(Episode, name)
        else:
            written = await self._writes.change(Episode, name, edit, by=by, validate_only=request.validate_only)
            assert written is not None, "edit never deletes"
            after = written
            detection = self._chair.leading().detection
            if detection is not None and not request.validate_only:
                detection.labelled(after)
        return episode_message(after)


def _no_episode(name: str) -> NotFound:
    return NotFound(
        f"there is no {name}",
        field="name",
        remedy="enova episodes lists those that are kept",
        metadata={"name": name},
    )


def _cause(text: str) -> str:
    """The name of a cause, in whatever case it was written. Raises InvalidField."""
    name = text.strip().upper().replace("-", "_")
    if name and name not in Cause.__members__:
        known = ", ".join(Cause.__members__)
        raise InvalidField(f"{text[:80]!r} is no cause", field="cause", remedy=f"one of {known}")
    return name


def _concerns(episode: Episode, obj: str) -> bool:
    """Whether an episode is about an object, or about something that is part of it."""
    if not obj or episode.object == obj or episode.object.startswith(obj + "/"):
        return True
    return any(member == obj or member.startswith(obj + "/") for member in episode.members)


def _standing(leading: Leading, obj: str) -> list[Verdict]:
    """Of deployments the policy's; of replicas the detector's, and the agents' where it says nothing.

    Of one object and what is part of it, or of all.
    """
    snapshot, detection = leading.control.snapshot, leading.detection
    of_deployments = [verdict for name, verdict in leading.verdicts.items() if name in snapshot.deployments]
    found = dict(detection.verdicts) if detection is not None else {}
    for replica in snapshot.replicas.values():
        supervised = of_replica(replica)
        if supervised is not None:
            found.setdefault(replica.name, supervised)
    every = of_deployments + [verdict for name, verdict in found.items() if name in snapshot.replicas]
    return [each for each in every if obj in {"", each.object} or each.object.startswith(obj + "/")]


def _message(verdict: Verdict) -> verdict_service_pb2.Verdict:
    weights = verdict.weights or (0.0,) * len(verdict.evidence)
    message = verdict_service_pb2.Verdict(
        object=verdict.object,
        kind=f"KIND_{verdict.kind.value}",  # type: ignore[arg-type]  # protobuf takes the enum's name
        reason=verdict.reason,
        detector=verdict.detector,
        evidence=[
            verdict_service_pb2.Evidence(
                feature=each.feature, value=each.value, threshold=each.threshold, contribution=weight
            )
            for each, weight in zip(verdict.evidence, weights, strict=True)
        ],
        suggested_action=verdict.suggested_action,
        score=verdict.score,
        confidence=verdict.confidence,
        cause=verdict.cause,
    )
    _set_time(message.since_time, verdict.since_s)
    return message


def episode_message(value: Episode) -> verdict_service_pb2.Episode:
    """An episode, for the wire."""
    message = verdict_service_pb2.Episode(
        name=value.name,
        etag=value.etag,
        object=value.object,
        kind=f"KIND_{value.verdict.value}",  # type: ignore[arg-type]
        causes=value.causes,
        members=value.members,
        member_count=value.member_count,
        state=f"STATE_{value.state.value}",  # type: ignore[arg-type]
        score=value.score,
        confidence=value.confidence,
        suggested_action=value.suggested_action,
        evidence=[
            verdict_service_pb2.Evidence(
                feature=each.feature, value=each.value, threshold=each.threshold, contribution=each.contribution
            )
            for each in value.findings
        ],
        series=[
            decision_service_pb2.DecisionInput(
                object=each.object, feature=each.feature, start_s=each.start_s, step_s=each.step_s, values=each.values
            )
            for each in value.series
        ],
        label=f"LABEL_{value.label.value or 'UNSPECIFIED'}",  # type: ignore[arg-type]
        label_cause=value.label_cause,
        label_actor=value.label_actor,
        since_model_s=value.since_model_s,
    )
    for stamp, seconds in (
        (message.since_time, value.since_s),
        (message.open_time, value.open_time_s),
        (message.update_time, value.update_time_s),
        (message.close_time, value.close_time_s),
        (message.label_time, value.label_time_s),
    ):
        _set_time(stamp, seconds)
    return message


def _set_time(stamp: Timestamp, seconds: float) -> None:
    """Zero is not yet."""
    if seconds > 0:
        stamp.FromMicroseconds(round(seconds * 1e6))
