"""The words and the environment that start an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from enova_agent.core.command import Command, EngineCommand, build, max_concurrency, served_names
from enova_agent.core.hub import HubModel, hub_model
from enova_agent.core.model import Claim, MemberSpec
from enova_common.errors import InvalidField

SPEC = MemberSpec(
    replica="deployments/chat/replicas/a1",
    uid="u",
    model="/models/llama",
    configuration={"max_num_seqs": 64, "enable_prefix_caching": False, "enforce_eager": True, "dtype": "bfloat16"},
    claims=(Claim(gpu_uuid="GPU-a"), Claim(gpu_uuid="GPU-b")),
)


def command(
    spec: MemberSpec = SPEC, engine: EngineCommand | None = None, ambient: Mapping[str, str] | None = None
) -> Command:
    return build(
        spec, engine or EngineCommand(), port=4321, token="t.1", record="{}", gpu_types={"GPU-a": "H100"},
        ambient=ambient or {},
    )


def test_the_model_stands_where_the_program_wants_it() -> None:
    assert command().argv[:3] == ("vllm", "serve", SPEC.model)
    server = EngineCommand(words=("python", "-m", "vllm.entrypoints.openai.api_server"))
    assert command(engine=server).argv[:5] == (*server.words, "--model", SPEC.model)


def test_the_configuration_becomes_flags_and_booleans_their_negatives() -> None:
    argv = " ".join(command().argv)
    assert "--max-num-seqs 64" in argv
    assert "--dtype bfloat16" in argv
    assert "--enforce-eager" in argv
    assert "--no-enable-prefix-caching" in argv


def test_enova_s_own_words_come_last_so_that_nothing_overrides_them() -> None:
    engine = EngineCommand(extra_arguments=("--host", "0.0.0.0", "--port", "1"), term_timeout_s=10.0)
    argv = command(engine=engine).argv
    assert argv[-6:] == ("--host", "127.0.0.1", "--port", "4321", "--served-model-name", "chat")
    assert argv.index("0.0.0.0") < argv.index("127.0.0.1")
    assert argv[argv.index("--shutdown-timeout") + 1] == "9"
    assert "--shutdown-timeout" not in command(engine=replace(engine, shutdown_timeout=False)).argv


def test_served_names_default_to_the_deployment() -> None:
    assert served_names(SPEC) == ("chat",)
    argv = command(replace(SPEC, served_names=("a", "b"))).argv
    assert argv[-3:] == ("--served-model-name", "a", "b")


def test_extra_arguments_know_the_replica_and_its_gpus_and_nothing_else() -> None:
    engine = EngineCommand(extra_arguments=("--x={replica}", "{gpu_uuids}", "{gpu_types}", "{port} {0.__class__}"))
    argv = command(engine=engine).argv
    assert f"--x={SPEC.replica}" in argv
    assert "GPU-a,GPU-b" in argv
    assert "H100,unknown" in argv
    assert "{port} {0.__class__}" in argv


@pytest.mark.parametrize("name", ["trust_remote_code", "host", "worker_cls", "--max-num-seqs", "max_num_seqs=1", ""])
def test_a_setting_off_the_list_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidField, match="not a setting") as error:
        command(replace(SPEC, configuration={name: "1"}))
    assert error.value.field == f"configuration.{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_num_seqs", 0), ("max_num_seqs", "64"), ("dtype", "--api-key"), ("enforce_eager", 1), ("seed", True)],
)
def test_a_value_of_the_wrong_kind_is_refused_by_field(name: str, value: int | str | bool) -> None:
    with pytest.raises(InvalidField) as error:
        command(replace(SPEC, configuration={name: value}))
    assert error.value.field == f"configuration.{name}"


@pytest.mark.parametrize("word", ["--trust-remote-code", "-x", "", "a\nb", "a\0b"])
def test_a_model_or_name_that_is_no_plain_word_is_refused(word: str) -> None:
    with pytest.raises(InvalidField) as error:
        command(replace(SPEC, model=word))
    assert error.value.field == "model"
    with pytest.raises(InvalidField) as error:
        command(replace(SPEC, served_names=("ok", word)))
    assert error.value.field == "served_names"


def test_another_engine_than_the_host_s_and_replicas_over_nodes_are_refused() -> None:
    with pytest.raises(InvalidField, match="simulated"):
        command(replace(SPEC, engine="simulated"))
    assert command(replace(SPEC, engine="vllm")).argv
    with pytest.raises(InvalidField, match="nodes"):
        command(replace(SPEC, member_count=2))


def test_the_environment_is_made_of_a_few_known_variables() -> None:
    ambient = {"PATH": "/bin", "HOME": "/root", "LD_PRELOAD": "evil.so", "VLLM_PLUGINS": "x", "HF_TOKEN": "secret"}
    environment = command(ambient=ambient).environment
    assert environment["PATH"] == "/bin"
    assert not {"LD_PRELOAD", "VLLM_PLUGINS", "HF_TOKEN"} & set(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert environment["ENOVA_ENGINE_TOKEN"] == "t.1"
    assert environment["ENOVA_REPLICA"] == SPEC.replica
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_downloads_and_variables_are_the_host_s_choice_but_identity_is_not() -> None:
    engine = EngineCommand(allow_downloads=True, environment={"X": "1", "ENOVA_ENGINE_TOKEN": "forged"})
    ambient = {"HF_TOKEN": "hf_secret", "HF_HOME": "/big"}
    built = command(replace(SPEC, model="org/name@v1.0"), engine, ambient)
    environment = built.environment
    assert "HF_HUB_OFFLINE" not in environment
    assert (environment["HF_TOKEN"], environment["HF_HOME"]) == ("hf_secret", "/big")
    assert not any("hf_secret" in word for word in built.argv)
    assert environment["X"] == "1"
    assert environment["ENOVA_ENGINE_TOKEN"] == "t.1"


def test_a_model_of_the_hub_is_named_with_its_revision_apart() -> None:
    engine = EngineCommand(words=("python", "-m", "server"), allow_downloads=True)
    argv = command(replace(SPEC, model="Qwen/Qwen2.5-0.5B@refs/pr/1"), engine).argv
    assert argv[3:7] == ("--model", "Qwen/Qwen2.5-0.5B", "--revision", "refs/pr/1")
    serve = command(replace(SPEC, model="Qwen/Qwen2.5-0.5B"), replace(engine, words=("vllm", "serve"))).argv
    assert serve[:3] == ("vllm", "serve", "Qwen/Qwen2.5-0.5B")
    assert "--revision" not in serve


def test_a_host_that_fetches_nothing_refuses_a_model_of_the_hub_and_names_the_setting() -> None:
    with pytest.raises(InvalidField, match=r"engine\.allow_downloads = true") as refusal:
        command(replace(SPEC, model="org/name"))
    assert refusal.value.field == "model"
    catalogue = command(replace(SPEC, model="org/name"), EngineCommand(kind="simulated", allow_downloads=True))
    assert catalogue.environment["HF_HUB_OFFLINE"] == "1"


def test_a_model_directory_gets_no_token_even_where_downloads_are_allowed() -> None:
    environment = command(engine=EngineCommand(allow_downloads=True), ambient={"HF_TOKEN": "secret"}).environment
    assert "HF_TOKEN" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("org/name", "org/name", ""),
        ("meta-llama/Llama-3.1-8B@main", "meta-llama/Llama-3.1-8B", "main"),
        ("a/b@refs/pr/7", "a/b", "refs/pr/7"),
    ],
)
def test_names_of_the_hub_are_known(text: str, name: str, revision: str) -> None:
    assert hub_model(text) == HubModel(name=name, revision=revision)


@pytest.mark.parametrize(
    "text",
    ["/models/x", "name", "a/b/c", "a/b@", "../x", "a/..", "a/b@../x", "a/b@x..y", "-a/b", "a/-b", "a/b--c", "a/b.git",
     "a/b@-x", "a /b", "a/b\n", "a/b@x/", "a/" + "b" * 97],
)
def test_other_words_are_no_names_of_the_hub(text: str) -> None:
    assert hub_model(text) is None


def test_slots_that_are_no_gpus_leave_the_visible_devices_alone() -> None:
    spec = replace(SPEC, claims=(Claim(gpu_uuid="CPU-0"),))
    assert "CUDA_VISIBLE_DEVICES" not in command(spec).environment


def test_max_concurrency_is_what_the_engine_was_told() -> None:
    assert max_concurrency(SPEC) == 64
    assert max_concurrency(replace(SPEC, configuration={})) == 256
