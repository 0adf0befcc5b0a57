"""DecisionService: why things are as they are."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

from enova.v1 import decision_service_pb2, decision_service_pb2_grpc
from enova_common.errors import InvalidField, NotFound
from enova_coordinator.core.explain import explain
from enova_coordinator.core.model import Decision
from enova_coordinator.recorder import Place
from enova_coordinator.service import convert, names, paging
from enova_coordinator.service.leading import Chair, actor
from enova_coordinator.service.live import live_words
from enova_coordinator.service.watching import check_resume_revision, watch
from enova_coordinator.store import Store, codec

Context = Any  # grpc.aio.ServicerContext of whatever messages
EXPLAIN_DECISIONS = 5
EXPLAIN_EVENTS = 10


class DecisionService(decision_service_pb2_grpc.DecisionServiceServicer):
    """See decision_service.proto."""

    def __init__(self, store: Store, chair: Chair) -> None:
        self._store = store
        self._chair = chair

    async def GetDecision(  # noqa: N802
        self, request: decision_service_pb2.GetDecisionRequest, context: Context
    ) -> decision_service_pb2.Decision:
        """One decision."""
        actor(context)
        name = names.decision_name(request.name)
        entry = await self._store.get(codec.key(name))
        if entry is None:
            raise NotFound(
                f"there is no {name}",
                field="name",
                remedy="enova get decisions lists those that are kept",
                metadata={"name": name},
            )
        return convert.decision_message(codec.decode_as(Decision, entry.value, key=entry.key))

    async def ListDecisions(  # noqa: N802
        self, request: decision_service_pb2.ListDecisionsRequest, context: Context
    ) -> decision_service_pb2.ListDecisionsResponse:
        """A page of the decisions about one deployment, or about all; newest first."""
        actor(context)
        deployment = names.deployment_name(request.deployment, "deployment") if request.deployment else ""
        newest_first = await self._decisions(deployment)
        size = paging.page_size(request.page_size)
        last = paging.decode_token("decisions", request.page_token)
        at = next((index + 1 for index, each in enumerate(newest_first) if each.name == last), 0) if last else 0
        taken = newest_first[at : at + size]
        more = len(newest_first) > at + size
        return decision_service_pb2.ListDecisionsResponse(
            decisions=[convert.decision_message(each) for each in taken],
            next_page_token=paging.encode_token("decisions", taken[-1].name) if more else "",
        )

    async def WatchDecisions(  # noqa: N802
        self, request: decision_service_pb2.WatchDecisionsRequest, context: Context
    ) -> AsyncIterator[decision_service_pb2.WatchDecisionsResponse]:
        """First the decisions as they are (or those after resume_revision), then each as it is taken."""
        actor(context)
        deployment = names.deployment_name(request.deployment, "deployment") if request.deployment else ""
        prefix = codec.prefix("decisions", deployment)
        async for batch in watch(self._store, Decision, prefix, resume_revision=request.resume_revision):
            yield decision_service_pb2.WatchDecisionsResponse(
                revision=batch.revision, decisions=[convert.decision_message(each) for each in batch.changed]
            )

    async def ListEvents(  # noqa: N802
        self, request: decision_service_pb2.ListEventsRequest, context: Context
    ) -> decision_service_pb2.ListEventsResponse:
        """A page of what the leader remembers that happened; newest first."""
        actor(context)
        events = self._chair.leading().events
        newest_first = events.list(request.object)
        size = paging.page_size(request.page_size)
        last = paging.decode_token("events", request.page_token)
        at = next((index + 1 for index, each in enumerate(newest_first) if each.name == last), 0) if last else 0
        taken = newest_first[at : at + size]
        more = len(newest_first) > at + size
        return decision_service_pb2.ListEventsResponse(
            events=[convert.event_message(each) for each in taken],
            next_page_token=paging.encode_token("events", taken[-1].name) if more else "",
            revision=events.revision,
        )

    async def WatchEvents(  # noqa: N802
        self, request: decision_service_pb2.WatchEventsRequest, context: Context
    ) -> AsyncIterator[decision_service_pb2.WatchEventsResponse]:
        """What happened after resume_revision, or from now on, and what happens."""
        actor(context)
        log = self._chair.leading().events
        check_resume_revision(request.resume_revision, remedy="leave it out")
        async for events in log.watch(request.object, after=request.resume_revision):
            yield decision_service_pb2.WatchEventsResponse(
                events=[convert.event_message(each) for each in events],
                revision=events[-1].revision,
            )

    async def Explain(  # noqa: N802
        self, request: decision_service_pb2.ExplainRequest, context: Context
    ) -> decision_service_pb2.ExplainResponse:
        """In words and numbers."""
        actor(context)
        leading = self._chair.leading()
        snapshot, name = leading.control.snapshot, request.name
        detection = leading.detection
        explanation = explain(
            snapshot,
            name,
            verdicts=leading.verdicts,
            lengths=leading.lengths,
            found=detection.verdicts if detection is not None else {},
            trouble=detection.trouble if detection is not None else "",
        )
        if explanation is None:
            raise NotFound(f"there is no {name[:120]}", field="name", remedy="enova get deployments, replicas, nodes")
        decisions = await self._decisions(explanation.deployment) if explanation.deployment else []
        live = await live_words(leading, name) if name in snapshot.deployments else ()
        return decision_service_pb2.ExplainResponse(
            name=name,
            state=explanation.state,
            sentences=[*explanation.sentences, *live],
            decisions=[convert.decision_message(each) for each in decisions[:EXPLAIN_DECISIONS]],
            events=[convert.event_message(each) for each in leading.events.list(name)[:EXPLAIN_EVENTS]],
        )

    async def ExportSituations(  # noqa: N802
        self, request: decision_service_pb2.ExportSituationsRequest, context: Context
    ) -> AsyncIterator[decision_service_pb2.ExportSituationsResponse]:
        """What the policy was told and what it wished, oldest first."""
        actor(context)
        recorder = self._chair.leading().recorder
        name = names.deployment_name(request.deployment, "deployment")
        if not (math.isfinite(request.last_s) and request.last_s >= 0):
            raise InvalidField(
                f"must not be less than 0, is {request.last_s:g}", field="last_s", remedy="3600 asks for the last hour"
            )
        place: Place | None = Place()
        while place is not None:
            page = await asyncio.wrap_future(recorder.read(name, last_s=request.last_s or math.inf, place=place))
            for line in page.lines:
                yield decision_service_pb2.ExportSituationsResponse(line=line)
            place = page.rest

    async def _decisions(self, deployment: str) -> list[Decision]:
        entries, _ = await self._store.range(codec.prefix("decisions", deployment))
        decisions = [codec.decode_as(Decision, entry.value, key=entry.key) for entry in entries]
        return sorted(decisions, key=lambda each: (each.create_time_s, each.name), reverse=True)
