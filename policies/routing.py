"""Chooses replicas by predicted latency: filter, score, pick."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np
import xxhash

from cluster.errors import InvalidConfig
from cluster.kv import KvLayout
from cluster.performance import PerformanceModel
from cluster.replica import Phase, Replica, Role
from policies import scoring
from policies.route import Ask, Choice, Rejection, Route, Terms
from policies.routing_view import FleetView, RoutingView

NO_DEPTHS = np.zeros(0)

TERMS: Mapping[str, int] = {
    "queue_s": scoring.QUEUE_S,
    "prefill_s": scoring.OWN_PREFILL_S,
    "transfer_s": scoring.TRANSFER_S,
    "ttft_s": scoring.TTFT_S,
    "decode_step_s": scoring.DECODE_STEP_S,
    "drag_s": scoring.DRAG_S,
    "tpot_s": scoring.TPOT_S,
    "burden_s": scoring.BURDEN_S,
    "slo_miss_s": scoring.MISS_S,
    "cached_tokens": scoring.CACHED_TOKENS,
    "held_back": scoring.HELD_BACK,
}
"""A choice's terms and where `scoring.score` puts them.

queue_s: prompts ahead. prefill_s: its own. transfer_s: KV on the way that no computing covers; of a decode replica the least of it.
drag_s: prompts computed between its tokens. burden_s: seconds that all other requests there lose by it. slo_miss_s: for each bound
it will miss. held_back: 1 for a newcomer taken as a last resort.
"""


class PredictedLatencyRouter(msgspec.Struct, frozen=True, kw_only=True):
    """Lowest predicted latency, own and others', among those that keep the SLO.

    A prompt is computed where it is decoded, or remotely where that is predicted to cost less. `warm` it before the first request.
    """

    stale_s: float = 2.0
    """A replica not heard of for so long is left out, seconds, > 0: ten load reports missed."""
    ramp_s: float = 30.0
    """A newcomer's share of requests grows from none to all over so long, seconds, >= 0: some tens of prompts fill its cache,
    and a broken newcomer is noticed while it holds few."""
    slo_miss_s: float = 60.0
    """A bound that will be missed weighs as much as so many seconds, >= 0: more than any wait a queue would bear."""
    link_bytes_per_s: float = 7e8
    """KV between hosts, bytes/s, > 0: a gRPC stream carried 0.64 to 1.06 GB/s on loopback, 2 cores (`benchmarks.kv_transfer`)."""
    host_bytes_per_s: float = 1.5e9
    """KV through shared memory, bytes/s, > 0: 1.35 to 2.07 GB/s were measured there."""
    transfer_setup_s: float = 0.012
    """What a pull costs beside its bytes, seconds, >= 0: calls between two processes, and two engines' steps that begin without
    waiting for it. Measured: prompts of 4 to 64 tokens took 9 to 11 ms longer apart, on 2 cores."""
    retry_s: float = 1.0
    """When to ask again where nothing can be predicted, as no replica is ready, seconds, > 0: the heartbeat's order."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value, positive = getattr(self, name), name in ("stale_s", "link_bytes_per_s", "host_bytes_per_s", "retry_s")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise InvalidConfig(f"routing.settings.{name} {value} is outside {'(' if positive else '['}0, inf)")

    def route(self, ask: Ask, view: RoutingView) -> Route | Rejection:
        """The best place now, or why there is none."""
        picks = self._score(ask, view)
        local, decode, prefill = picks[scoring.LOCAL], picks[scoring.DECODE], picks[scoring.PREFILL]
        if local[scoring.ROW] < 0:
            return self._reject(ask, view, picks[scoring.OUTLOOK])
        if prefill[scoring.ROW] < 0:
            return _here(ask, view, picks, "no prefill replica")
        remote_s = decode[scoring.SCORE] - decode[scoring.TRANSFER_S] + prefill[scoring.SCORE]
        held_back = max(decode[scoring.HELD_BACK], prefill[scoring.HELD_BACK])
        if (local[scoring.HELD_BACK], local[scoring.SCORE]) <= (held_back, remote_s):
            uncached = ask.prompt_tokens - int(local[scoring.CACHED_TOKENS])
            reason = f"{uncached} uncached tokens are cheaper here: {local[scoring.SCORE]:.3g} s of {remote_s:.3g}"
            return _here(ask, view, picks, reason)
        return _remote(ask, view, picks, f"remote prefill is cheaper: {remote_s:.3g} s of {local[scoring.SCORE]:.3g}")

    def warm(self) -> None:
        """Compile, or load what was compiled: seconds the first time on a machine."""
        fleet = FleetView()
        fleet.membership((_example("decode", Role.DECODE), _example("prefill", Role.PREFILL)), 0.0)
        ask = Ask(request_id="", model="", prompt_tokens=1, block_hashes=(), expected_output_tokens=1, max_output_tokens=1)
        self.route(ask, fleet.routing_view("", 0.0))

    def _score(self, ask: Ask, view: RoutingView) -> list[list[float]]:
        depths = view.index.match(ask.block_hashes) if ask.block_hashes else ()
        width = (len(view.rows) >> 3) + 1
        if depths or ask.excluded:
            excluded = sum(1 << view.row_of[replica_id] for replica_id in ask.excluded if replica_id in view.row_of)
            masks = [excluded, *(mask for _, mask in depths)]
            holders = np.frombuffer(b"".join([mask.to_bytes(width, "little") for mask in masks]), dtype=np.uint8)
            holders = holders.reshape(len(masks), width)
        else:
            holders = np.zeros((1, width), np.uint8)
        picks = scoring.score(
            view.rows,
            holders,
            np.array([depth for depth, _ in depths], dtype=np.float64) if depths else NO_DEPTHS,
            xxhash.xxh3_64_intdigest(ask.request_id.encode()) >> 2,
            float(ask.prompt_tokens),
            float(max(ask.expected_output_tokens, 1)),
            float(ask.max_output_tokens),
            math.inf if ask.ttft_slo_s is None else ask.ttft_slo_s,
            math.inf if ask.tpot_slo_s is None else ask.tpot_slo_s,
            view.now_s,
            view.oldest_prefill_s,
            view.oldest_decode_s,
            self.stale_s,
            self.ramp_s,
            self.slo_miss_s,
            self.link_bytes_per_s,
            self.host_bytes_per_s,
            self.transfer_setup_s,
        )
        answer: list[list[float]] = picks.tolist()
        return answer

    def _reject(self, ask: Ask, view: RoutingView, outlook: list[float]) -> Rejection:
        decoders, fitting, reachable = (int(count) for count in outlook[: scoring.ROOM_S])
        if not decoders:
            return Rejection(reason=f"no replica decodes model {ask.model}", retry_after_s=self.retry_s)
        if not fitting:
            tokens, bound = ask.prompt_tokens + ask.max_output_tokens, _largest(view)
            reason = f"{tokens} prompt and output tokens above {bound}, the most a replica of {ask.model} holds"
            return Rejection(reason=reason, retry_after_s=None)
        if not reachable:
            reason = f"0 of {fitting} replicas of {ask.model} are ready and not excluded"
            return Rejection(reason=reason, retry_after_s=self.retry_s)
        need = ask.prompt_tokens + ask.expected_output_tokens
        return Rejection(
            reason=f"no room for {need} tokens in any of {reachable} replicas of {ask.model}: all are at max_running or kv_blocks",
            retry_after_s=outlook[scoring.ROOM_S],
        )


def _here(ask: Ask, view: RoutingView, picks: list[list[float]], reason: str) -> Route:
    best = picks[scoring.LOCAL]
    cached = int(best[scoring.CACHED_TOKENS])
    return Route(
        decode=_chosen(view, best),
        decode_runner_up=_choice(view, picks[scoring.LOCAL + 1]),
        prefill=None,
        prefill_runner_up=_choice(view, picks[scoring.PREFILL]),
        reason=reason,
        predicted_ttft_s=best[scoring.TTFT_S],
        predicted_tpot_s=best[scoring.TPOT_S],
        cached_tokens=cached,
        uncached_tokens=ask.prompt_tokens - cached,
    )


def _remote(ask: Ask, view: RoutingView, picks: list[list[float]], reason: str) -> Route:
    decode, prefill = picks[scoring.DECODE], picks[scoring.PREFILL]
    cached = int(prefill[scoring.CACHED_TOKENS])
    return Route(
        decode=_chosen(view, decode),
        decode_runner_up=_choice(view, picks[scoring.DECODE + 1]),
        prefill=_chosen(view, prefill),
        prefill_runner_up=_choice(view, picks[scoring.PREFILL + 1]),
        reason=reason,
        predicted_ttft_s=prefill[scoring.TTFT_S],
        predicted_tpot_s=decode[scoring.TPOT_S],
        cached_tokens=cached,
        uncached_tokens=ask.prompt_tokens - cached,
    )


def _choice(view: RoutingView, pick: list[float]) -> Choice | None:
    return _chosen(view, pick) if pick[scoring.ROW] >= 0 else None


def _chosen(view: RoutingView, pick: list[float]) -> Choice:
    replica = view.replicas[int(pick[scoring.ROW])]
    assert replica is not None, "a free row was picked"
    return Choice(replica_id=replica.replica_id, terms=Terms(TERMS, pick), score=pick[scoring.SCORE])


def _largest(view: RoutingView) -> int:
    """Tokens that the roomiest of the decoding replicas holds when empty."""
    decoding = (replica for replica in view.replicas if replica is not None and replica.role.decodes)
    return max(min(replica.context_tokens, replica.kv_blocks * replica.block_tokens) for replica in decoding)


def _example(replica_id: str, role: Role) -> Replica:
    return Replica(
        replica_id=replica_id,
        worker_id="",
        node="",
        endpoint="",
        role=role,
        phase=Phase.READY,
        model="",
        engine="",
        performance=PerformanceModel(step_s=1.0, prefill_token_s=1.0),
        layout=KvLayout(layers=1, kv_heads=1, head_dim=1),
        kv_blocks=2,
        context_tokens=16,
        max_running=1,
        step_budget_tokens=1,
    )
