"""What one replica of the configuration that runs now carries: plain values in, a capacity out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from enova_recommender.recommend.respond import Problem
from enova_recommender.recommend.types import Capacity, MeanLengths, Workload
from enova_recommender.types import Batch


def carried(plain: Mapping[str, object]) -> Capacity | Problem:
    """The capacity of `current` in a request as `respond` takes it, or why it cannot be told."""
    # The search brings scipy, which takes a second to import: who only names this function does without.
    from enova_recommender.recommend.advise import evaluate, times_of
    from enova_recommender.recommend.errors import RecommendError
    from enova_recommender.recommend.request import RequestError, request_from_plain

    try:
        request = request_from_plain(plain)
        settings = request.current
        if settings is None:
            return Problem(field="current", message="no configuration is named that runs")
        request = replace(request, workload=_accepted(request.workload, settings.max_model_len))
        found = evaluate(request, settings)
    except RecommendError as error:
        remedy = error.remedy if isinstance(error, RequestError) else ""
        return Problem(field=error.field, message=error.message, remedy=remedy)
    if found is None or found.prediction is None:
        why = found.reason if found is not None else "the model cannot be cut so"
        return Problem(field="current", message=why)
    prediction = found.prediction
    times = times_of(request)(request.shape, settings.gpu, settings.parallelism, settings.precision)
    chunk = settings.max_num_batched_tokens
    prefill = Batch(prefill_tokens=chunk, prefill_pairs=chunk * chunk // 2, decode_sequences=0, context_tokens=0)
    # The batch at capacity, by Little's law: those that decode are rate x answer x gap between tokens.
    tokens_per_s = prediction.decode_tokens_per_s
    gap_s = request.objectives.tpot_s or prediction.tpot_s.value
    batch = max(1, min(settings.max_num_seqs, round(tokens_per_s * gap_s)))
    lengths = request.workload.lengths
    mean = MeanLengths(*(sum(tokens) / len(lengths) for tokens in zip(*lengths, strict=True)))
    mean_context = mean.prompt_tokens + mean.output_tokens / 2
    context = max(batch, min(prediction.kv_tokens, round(batch * mean_context)))
    decode = Batch(prefill_tokens=0, prefill_pairs=0, decode_sequences=batch, context_tokens=context)
    return Capacity(
        requests_per_s=prediction.capacity_rps,
        prefill_tokens_per_s=chunk / times.step_s(prefill),
        decode_tokens_per_s=batch / times.step_s(decode),
        kv_tokens=prediction.kv_tokens,
        max_num_seqs=settings.max_num_seqs,
        told_for=mean,
    )


def _accepted(workload: Workload, context_tokens: int) -> Workload:
    """Without what the engine that runs refuses or cuts: it is not to be carried."""
    most = context_tokens - 1
    return replace(
        workload,
        lengths=tuple((min(prompt, most), min(answer, context_tokens - min(prompt, most)))
                      for prompt, answer in workload.lengths),
    )
