"""Addresses, identities, the model clock, statuses and log lines: the rules of the small parts."""

from __future__ import annotations

import io
import json
import logging

import pytest
from google.rpc import error_details_pb2

from enova_common import errors, logs, rpc
from enova_common.address import Address, parse_address
from enova_common.clock import ModelClock, clock_from_environment
from enova_common.errors import EnovaError, InvalidField
from enova_common.identity import Identity, Role, parse_identity
from enova_common.notify import watchdog_interval_s

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EnovaError)]


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("127.0.0.1:7400", Address("127.0.0.1", 7400), True),
        ("127.9.9.9:0", Address("127.9.9.9", 0), True),
        ("[::1]:80", Address("::1", 80), True),
        ("localhost:1", Address("localhost", 1), True),
        ("unix:/run/enova.sock", Address("unix:/run/enova.sock", 0), True),
        ("0.0.0.0:80", Address("0.0.0.0", 80), False),
        ("[::]:80", Address("::", 80), False),
        ("10.0.0.5:80", Address("10.0.0.5", 80), False),
        ("localhost.evil.org:80", Address("localhost.evil.org", 80), False),
        ("127.0.0.1.evil.org:80", Address("127.0.0.1.evil.org", 80), False),
    ],
)
def test_an_address_is_parsed_and_known_to_stay_here_or_not(text: str, address: Address, loopback: bool) -> None:
    assert parse_address(text) == address
    assert str(address) == text
    assert address.is_loopback is loopback


@pytest.mark.parametrize("text", ["", ":1", "host", "host:", "host:70000", "host:-1", "::1:80", "unix:", "a/b:1"])
def test_what_is_no_address_is_refused_with_its_field(text: str) -> None:
    with pytest.raises(InvalidField) as raised:
        parse_address(text, field="listen")
    assert raised.value.field == "listen"


def test_an_identity_survives_its_uri() -> None:
    for role in Role:
        identity = Identity(role, "gpu-host_1.lab")
        assert parse_identity(identity.uri) == identity


@pytest.mark.parametrize(
    "uri", ["", "spiffe://other/agent/a", "spiffe://enova/king/a", "spiffe://enova/agent/", "spiffe://enova/agent/a/b"]
)
def test_a_uri_that_is_not_ours_names_nobody(uri: str) -> None:
    assert parse_identity(uri) is None


def test_model_time_runs_scale_times_as_fast_from_the_epoch() -> None:
    clock = ModelClock(scale=60.0, epoch_unix_s=1000.0)
    assert clock.at(1000.0) == 1000.0
    assert clock.at(1001.0) == 1060.0
    assert clock.real_s(120.0) == 2.0
    assert clock.model_s(2.0) == 120.0
    assert ModelClock().at(1234.5) == 1234.5


@pytest.mark.parametrize(
    ("env", "field"),
    [
        ({"ENOVA_TIME_SCALE": "fast"}, "ENOVA_TIME_SCALE"),
        ({"ENOVA_TIME_SCALE": "0", "ENOVA_CLOCK_EPOCH": "1"}, "time_scale"),
        ({"ENOVA_TIME_SCALE": "nan", "ENOVA_CLOCK_EPOCH": "1"}, "time_scale"),
        ({"ENOVA_TIME_SCALE": "10"}, "ENOVA_CLOCK_EPOCH"),
        ({"ENOVA_CLOCK_EPOCH": "-1"}, "clock_epoch"),
    ],
)
def test_a_wrong_clock_names_what_to_set(env: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidField) as raised:
        clock_from_environment(env)
    assert raised.value.field == field


def test_the_clock_of_the_environment() -> None:
    assert clock_from_environment({}) == ModelClock()
    assert clock_from_environment({"ENOVA_TIME_SCALE": "10", "ENOVA_CLOCK_EPOCH": "5"}) == ModelClock(10.0, 5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error_has_a_code_and_keeps_its_family_over_the_wire(kind: type[EnovaError]) -> None:
    error = kind("what", field="spec.min", remedy="do", metadata={"a": "b"}, reason="WHY")
    back = rpc.error_from_status(rpc.status_from_error(error))
    assert rpc.grpc_code(back) is rpc.grpc_code(error)
    assert (back.message, back.field, back.remedy, back.metadata, back.reason) == (
        "what", "spec.min", "do", {"a": "b"}, "WHY",
    )
    families = (errors.CallerError, errors.RetryableError)
    assert [isinstance(back, family) for family in families] == [issubclass(kind, family) for family in families]


def test_kinds_that_callers_tell_apart_have_codes_of_their_own() -> None:
    told_apart = (
        errors.InvalidField, errors.NotFound, errors.AlreadyExists, errors.Conflict, errors.Denied,
        errors.Unauthenticated, errors.TooLarge, errors.Unavailable, errors.TimedOut, errors.Exhausted, errors.Corrupt,
    )
    assert len({rpc.grpc_code(kind("x")) for kind in told_apart}) == len(told_apart)


def test_a_status_has_one_error_info_and_a_violation_for_a_field() -> None:
    status = rpc.status_from_error(InvalidField("too many", field="max"))
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert [detail.TypeName() for detail in status.details] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(request)
    assert (info.domain, info.reason) == ("enova", "INVALID_FIELD")
    assert [(v.field, v.description) for v in request.field_violations] == [("max", "too many")]


@pytest.mark.parametrize(
    ("env", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "4000000"}, 2.0),
        ({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(env: dict[str, str], interval_s: float | None) -> None:
    assert watchdog_interval_s(env) == interval_s


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("enova.test", logging.WARNING, "", 0, message, args, None)
    made.created = 1_700_000_000.25
    vars(made).update(extra)
    return made


def test_a_json_record_is_one_object_with_its_context_and_fields() -> None:
    formatter = logs.JsonFormatter("enova-agent")
    with logs.log_context(node="n1"), logs.log_context(replica="r1"):
        line = formatter.format(record("%d started", 3, pid=7, share=float("nan"), gpus=("a", 1)))
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z", "level": "WARNING", "program": "enova-agent", "logger": "enova.test",
        "message": "3 started", "node": "n1", "replica": "r1", "pid": 7, "share": "nan", "gpus": ["a", 1],
    }
    assert "node" not in json.loads(formatter.format(record("outside")))


@pytest.mark.parametrize("formatter", [logs.JsonFormatter("p"), logs.TextFormatter()])
def test_no_text_forges_a_line_or_reaches_the_terminal(formatter: logging.Formatter) -> None:
    line = formatter.format(record("a\nb\r\x1b[31mc\u2028\x9b\u202e %s", "\n\x07", model="x\ny\x1b"))
    assert line.isprintable()


def test_a_wrong_format_string_costs_the_format_and_not_the_record() -> None:
    assert "%d of" in json.loads(logs.JsonFormatter("p").format(record("%d of %d", "x")))["message"]


def test_a_long_message_is_cut_and_says_how_long_it_was() -> None:
    message = json.loads(logs.JsonFormatter("p").format(record("x" * 100_000)))["message"]
    assert message.endswith("... (100000 characters)")
    assert len(message) < 10_000


def test_an_exception_is_in_its_record() -> None:
    made = record("failed")
    with pytest.raises(ValueError, match="invalid literal") as raised:
        int("why\x1b")
    made.exc_info = (raised.type, raised.value, raised.tb)
    assert "ValueError: invalid" in json.loads(logs.JsonFormatter("p").format(made))["exception"]
    text = logs.TextFormatter().format(made)
    assert "\x1b" not in text
    assert "    ValueError: invalid" in text


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidField) as raised:
        logs.configure("p", level="LOUD", stream=io.StringIO())
    assert raised.value.field == "log_level"
