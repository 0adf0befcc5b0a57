"""The life of the engine process: bind, start by phases, serve, end as vLLM ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket

from aiohttp import web

from enova_common.vllm import ExitCode
from enova_simulator.engine.api import Api, ServerState
from enova_simulator.engine.clock import ModelClock
from enova_simulator.engine.command_line import Options
from enova_simulator.engine.core_process import CoreProcess
from enova_simulator.engine.faults import Fault, FaultKind
from enova_simulator.engine.generation import Generator
from enova_simulator.engine.gpu import GpuReader
from enova_simulator.engine.ills import Ills
from enova_simulator.engine.metrics import EngineMetrics
from enova_simulator.engine.model import Served, StartRefused
from enova_simulator.engine.openai import Rules
from enova_simulator.engine.startup import phases

# Model seconds, as measured on the real server: from the core's death to the exit of the API server; from the last
# answer of a drain to the exit.
CORE_DEATH_S = 3.0
DRAIN_TEARDOWN_S = 4.0
log = logging.getLogger(__name__)


class Server:
    """One engine process."""

    def __init__(self, options: Options, served: Served, listener: socket.socket, faults: tuple[Fault, ...]) -> None:
        self._options, self._served, self._listener, self._faults = options, served, listener, faults
        self._clock = ModelClock(epoch_s=options.clock_epoch_s, scale=options.time_scale)
        self._state = ServerState()
        self._ended = asyncio.Event()  # a signal came, or the core died

    async def run(self) -> int:
        """Start, serve, end; returns the exit code."""
        try:
            return await self._live()
        finally:
            # The end has begun: another signal must not change the exit code while the interpreter winds down.
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)

    async def _live(self) -> int:
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()
        assert main is not None
        ignores = any(fault.kind is FaultKind.IGNORE_SIGTERM for fault in self._faults)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, (lambda: None) if ignores else main.cancel)
        core = CoreProcess() if self._options.core_process else None
        try:
            await self._start()
        except asyncio.CancelledError:
            if core is not None:
                core.kill()
            return ExitCode.INTERRUPTED_START
        except StartRefused:
            if core is not None:
                core.kill()
            raise
        return await self._serve(core)

    async def _start(self) -> None:
        if any(fault.kind is FaultKind.OUT_OF_MEMORY for fault in self._faults):
            raise StartRefused("torch.OutOfMemoryError: CUDA out of memory. (simulated fault)")
        extra_s = sum(fault.extra_s for fault in self._faults if fault.kind is FaultKind.SLOW_START)
        await asyncio.sleep(self._clock.real_span_s(extra_s))
        eager = bool(self._options.configuration["enforce_eager"])
        for phase in phases(self._served, eager=eager, total_s=self._options.start_s):
            await asyncio.sleep(self._clock.real_span_s(phase.duration_s))
            log.info(phase.line)

    async def _serve(self, core: CoreProcess | None) -> int:
        generator = Generator(self._served, self._clock, self._engine_metrics())
        gpu = GpuReader(self._served, generator)
        gpu.is_loaded = True
        ills = Ills(generator, gpu, core, core_died=lambda: self._on_core_death(generator))
        app = self._api(generator, gpu, ills).application()
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.SockSite(runner, self._listener, backlog=2048)
        await site.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, ills)
        host, port = self._listener.getsockname()[:2]
        log.info("Starting vLLM API server 0 on http://%s:%s", host, port)
        for fault in self._faults:
            if fault.kind not in {FaultKind.SLOW_START, FaultKind.OUT_OF_MEMORY}:
                ills.add(fault)
        ills.beat()
        log.info("Application startup complete.")
        await self._ended.wait()
        if self._state.is_dead:
            await asyncio.sleep(self._clock.real_span_s(CORE_DEATH_S))
        else:
            await self._end(site, runner, generator, ills)
        await runner.cleanup()
        return ExitCode.CLEAN

    async def _end(self, site: web.SockSite, runner: web.AppRunner, generator: Generator, ills: Ills) -> None:
        """Drain as long as the options allow, then abort."""
        timeout_s = self._options.shutdown_timeout_s
        log.info("shutdown: mode=%s timeout=%gs", "drain" if timeout_s else "abort", timeout_s)
        if timeout_s and await self._drained(timeout_s):
            await asyncio.sleep(self._clock.real_span_s(DRAIN_TEARDOWN_S))
        # Abort: the port closes and the core is gone at once, but open requests hang until their clients leave.
        await site.stop()
        self._listener.close()
        generator.stop()
        ills.release_core()
        if runner.server is not None:
            runner.server.pre_shutdown()
        await self._state.quiet.wait()

    async def _drained(self, timeout_s: float) -> bool:
        """Whether requests were open and all ended in time; meanwhile new ones are refused."""
        self._state.is_draining = True
        if self._state.quiet.is_set():
            return False
        try:
            await asyncio.wait_for(self._state.quiet.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _on_signal(self, ills: Ills) -> None:
        if not ills.ignores_sigterm:
            self._ended.set()

    def _on_core_death(self, generator: Generator) -> None:
        log.error("EngineCore died unexpectedly.")
        self._state.is_dead = True
        generator.fail("EngineCore died")
        self._ended.set()

    def _engine_metrics(self) -> EngineMetrics:
        return EngineMetrics(
            model_name=self._options.served_names[0],
            max_model_len=self._served.max_model_len,
            created_s=self._clock.now_s(),
            cache_config=_cache_config(self._options, self._served),
        )

    def _api(self, generator: Generator, gpu: GpuReader, ills: Ills) -> Api:
        options, served = self._options, self._served
        return Api(
            generator=generator,
            gpu=gpu,
            ills=ills,
            state=self._state,
            rules=Rules(
                served_names=options.served_names,
                max_model_len=served.max_model_len,
                block_size=served.limits.block_size,
                seed=options.integer("seed") or 0,
            ),
            root=options.model,
            api_keys=options.api_keys,
            load_tracking=options.load_tracking,
            request_id_headers=options.request_id_headers,
            stream_interval=options.integer("stream_interval") or 1,
            time_scale=options.time_scale,
        )


def bind(host: str, port: int) -> socket.socket:
    """The socket that will listen once the model is up; StartRefused if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartRefused(f"OSError: [Errno {error.errno}] {os.strerror(error.errno or 0)}") from error
    return listener


def _cache_config(options: Options, served: Served) -> dict[str, str]:
    """The labels of `cache_config_info`."""
    limits = served.limits
    tokens = limits.num_blocks * limits.block_size
    override = options.integer("num_gpu_blocks_override")
    unset = (
        "cache_hit_alignment_tokens", "hash_block_size", "kv_cache_layout", "kv_offloading_size", "mamba_block_size",
        "mamba_page_size_padded", "num_cpu_blocks", "prefix_match_unit", "skip_page_size_padded", "sliding_window",
    )  # fmt: skip
    off = (
        "enable_mamba_shared_prefix_checkpoint", "is_attention_free", "kv_sharing_fast_prefill",
        "use_kda_recoverssm", "use_replayssm",
    )  # fmt: skip
    return {
        **dict.fromkeys(unset, "None"),
        **dict.fromkeys(off, "False"),
        "_block_size_resolved": "True",
        "block_size": str(limits.block_size),
        "cache_dtype": options.text("kv_cache_dtype"),
        "effective_attention_block_size": str(limits.block_size),
        "enable_prefix_caching": str(limits.enable_prefix_caching),
        "engine": "0",
        "gpu_memory_utilization": str(options.configuration["gpu_memory_utilization"]),
        "kv_cache_dtype_skip_layers": "[]",
        "kv_cache_max_concurrency": str(round(tokens / served.max_model_len, 2)),
        "kv_cache_memory_bytes": str(limits.num_blocks * served.memory.plain_block_bytes),
        "kv_cache_size_tokens": str(tokens),
        "kv_offloading_backend": "native",
        "mamba_cache_dtype": "auto",
        "mamba_cache_mode": "none",
        "mamba_ssm_cache_dtype": "float32",
        "num_gpu_blocks": str(limits.num_blocks),
        "num_gpu_blocks_override": str(override),
        "prefix_cache_retention_interval": "0",
        "prefix_caching_hash_algo": "sha256",
        "replayssm_buffer_len": "16",
        "swa_bounded_replay": "True",
        "user_specified_block_size": "True" if options.configuration["block_size"] != 16 else "False",
    }
