"""What the simulated engine makes of a request: counts, limits, lengths, text."""

from __future__ import annotations

import json

import pytest

from enova_simulator.engine.command_line import parse_options
from enova_simulator.engine.faults import Fault, FaultKind, parse_fault
from enova_simulator.engine.openai import ApiError, Asked, Route, Rules, StreamWriter, Voice, parse_request

RULES = Rules(served_names=("m", "alias"), max_model_len=100, block_size=4, seed=7)


def asked(route: Route = Route.COMPLETION, **body: object) -> Asked:
    return parse_request({"prompt": [1, 2, 3], **body}, route, RULES, "id-1")


def test_without_max_tokens_completions_take_16_and_chat_all_the_room() -> None:
    assert asked(ignore_eos=True).output_tokens == 16
    messages = [{"role": "user", "content": "abcdefgh"}]
    assert asked(Route.CHAT, messages=messages, ignore_eos=True).output_tokens == 100 - 6


def test_any_served_name_will_do() -> None:
    assert asked(model="alias").model == "alias"
    with pytest.raises(ApiError) as caught:
        asked(model="other")
    assert caught.value.status == 404


def test_prompts_that_begin_alike_share_the_hashes_of_their_common_blocks() -> None:
    one, two = asked(prompt=[1] * 12).block_hashes, asked(prompt=[1] * 8 + [2] * 7).block_hashes
    assert len(one) == len(two) == 3
    assert one[:2] == two[:2]
    assert one[2] != two[2]
    text = asked(prompt="sixteen bytes ok" * 2).block_hashes
    assert len(text) == 2
    assert text[0] != text[1]


def test_min_tokens_is_kept_and_the_end_is_then_a_stop() -> None:
    request = parse_request({"prompt": "x", "max_tokens": 90, "min_tokens": 89}, Route.COMPLETION, RULES, "short")
    assert request.output_tokens in {89, 90}


def test_chat_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "abcd"}, {"type": "text", "text": "efgh"}]
    whole = asked(Route.CHAT, messages=[{"role": "user", "content": parts}])
    assert whole.prompt_tokens == 4 + 2


@pytest.mark.parametrize("messages", [None, [], ["hi"], [{"content": "no role"}]])
def test_bad_messages_are_refused(messages: object) -> None:
    with pytest.raises(ApiError, match=r"messages|message") as caught:
        asked(Route.CHAT, messages=messages)
    assert caught.value.status == 400


def test_text_is_one_word_a_token_however_it_is_cut() -> None:
    voice = Voice("7:id-1")
    whole = voice.say(0, 40)
    assert len(whole.split()) == 40
    assert voice.say(0, 13) + voice.say(13, 14) + voice.say(14, 40) == whole
    assert json.loads(f'"{whole}"') == whole


def test_stream_events_are_json_with_the_reason_in_the_last() -> None:
    request = asked(Route.CHAT, messages=[{"role": "user", "content": "x"}], stream=True,
                    stream_options={"include_usage": True, "continuous_usage_stats": True},
                    max_tokens=2, ignore_eos=True)  # fmt: skip
    writer = StreamWriter(request, "chatcmpl-1", 5)
    text = (
        writer.tokens("a", first=True, made=1, last=False) + writer.tokens(" b", first=False, made=2, last=True)
        + writer.end()
    ).decode()  # fmt: skip
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    first, second, total = map(json.loads, lines)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert first["usage"]["completion_tokens"] == 1
    assert second["choices"][0]["finish_reason"] == "length"
    assert (total["choices"], total["usage"]["completion_tokens"]) == ([], 2)


def test_the_command_line_is_vllms() -> None:
    options = parse_options(
        ["serve", "m", "--max_num_seqs=8", "-tp", "2", "--max-model-len", "8k", "--no-enable-prefix-caching",
         "--served-model-name", "a", "b", "--trust-remote-code", "--disable-log-stats"]
    )  # fmt: skip
    assert options.model == "m"
    assert options.served_names == ("a", "b")
    assert options.configuration["max_num_seqs"] == 8
    assert options.configuration["tensor_parallel_size"] == 2
    assert options.configuration["max_model_len"] == 8000
    assert options.configuration["enable_prefix_caching"] is False
    assert parse_options(["--model", "n"]).served_names == ("n",)


def test_faults_are_read_with_their_defaults() -> None:
    assert parse_fault({"kind": "slow", "factor": 3}) == Fault(kind=FaultKind.SLOW, factor=3)
    with pytest.raises(ValueError, match="is an object"):
        parse_fault([])
