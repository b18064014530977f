"""From logits to tokens, for all rows of a step at once.

A draw is a function of the row's logits, its parameters, its tokens and (seed, position), never of the batch around it. So a
seeded request goes on elsewhere with the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cluster.request import SamplingParams

PIECE_LOGITS = 2**17  # One MiB of float64.

_WORD = 2**64 - 1


class Drawn(NamedTuple):
    """`logprob` and `top` are the model's own, before temperature, penalties and masks. None and () unless asked for."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class SamplerState:
    """What one request's next draw depends on besides its logits: its parameters and its tokens so far."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int], vocabulary: int, eos_ids: frozenset[int]
    ) -> None:
        self.params = params
        self.position = len(generated)
        self._counts = self._seen = self._ends = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.bincount(torch.tensor(generated, dtype=torch.int64), minlength=vocabulary).float()
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[torch.tensor((*prompt, *generated), dtype=torch.int64)] = True
        if params.min_tokens:
            ends = set(params.stop_token_ids) if params.ignore_eos else eos_ids.union(params.stop_token_ids)
            self._ends = torch.tensor(sorted(token for token in ends if 0 <= token < vocabulary), dtype=torch.int64)
        self._penalised = self._counts is not None or self._seen is not None

    @property
    def adjusts(self) -> bool:
        """The next draw is not from the model's own logits."""
        return self._penalised or self.position < self.params.min_tokens

    def append(self, token_id: int) -> None:
        self.position += 1
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._seen is not None:
            self._seen[token_id] = True

    def adjust(self, row: torch.Tensor) -> None:
        """Penalise and mask one row of logits, in place.

        Repetition over prompt and output, as transformers and vLLM do; then frequency and presence over the output, as OpenAI.
        """
        params = self.params
        if self._seen is not None:
            self._seen = self._seen.to(row.device)
            repeated = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            row.copy_(torch.where(self._seen, repeated, row))
        if self._counts is not None:
            self._counts = self._counts.to(row.device)
            row.sub_(params.frequency_penalty * self._counts + params.presence_penalty * (self._counts > 0))
        if self._ends is not None and self.position < params.min_tokens:
            row[self._ends.to(row.device)] = -torch.inf


def draw(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[Drawn | None]:
    """One token a row, None where the row's largest logit is no finite number.

    logits: float32 [rows, vocabulary], left as they are. The states are not advanced.
    """
    adjusted = logits
    if any(state.adjusts for state in states):
        adjusted = logits.clone()
        for row, state in zip(adjusted, states, strict=True):
            if state.adjusts:
                state.adjust(row)
    largest, likeliest = adjusted.max(dim=-1)  # NaN is larger than any number.
    finite, chosen = largest.isfinite().tolist(), likeliest.tolist()
    sampled = [index for index, state in enumerate(states) if finite[index] and not state.params.greedy]
    for rows in _pieces(sampled, logits.shape[-1]):
        for index, token_id in zip(rows, _sample(adjusted[rows], [states[index] for index in rows]), strict=True):
            chosen[index] = token_id
    drawn = _with_logprobs(logits, states, chosen)
    return [each if sound else None for each, sound in zip(drawn, finite, strict=True)]


def _pieces(rows: list[int], vocabulary: int) -> list[list[int]]:
    """Rows in pieces whose temporaries stay in a core's cache."""
    size = max(1, PIECE_LOGITS // vocabulary)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that looks random and depends on nothing else.

    Two rounds of SplitMix64's finaliser (Steele, Lea, Flood 2014), one for each argument.
    """
    # 52 bits, not 53: (1 - 2^-52) * total is then below total for every total, so that inverting a CDF always finds a token.
    return (_mix(_mix(seed) + position) >> 12) * 2.0**-52


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    """Invert each row's CDF at its uniform number.

    The CDF runs in the order of token ids, not of probabilities: there, noise in the logits moves every bound a little, while in
    sorted order it would swap near-equal tokens and with them the outcome.
    """
    params = [state.params for state in states]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    # The maximum goes first, so that the smallest temperature overflows to -inf and not to NaN.
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / column([each.temperature for each in params])
    if any(each.top_k for each in params):
        scaled = _keep_top_k(scaled, [each.top_k for each in params])
    weights = scaled.exp_()
    for row, each in zip(weights, params, strict=True):
        if each.top_p < 1.0:
            _keep_top_p(row, each.top_p)
    cdf = weights.cumsum(dim=-1)
    target = column([uniform(each.seed, state.position) for each, state in zip(params, states, strict=True)]) * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(1).tolist()


def _keep_top_k(scaled: torch.Tensor, top_k: list[int | None]) -> torch.Tensor:
    """Mask all below the k-th largest of each row; equals of the k-th stay, as in transformers and vLLM."""
    vocabulary = scaled.shape[-1]
    kept = [min(k or vocabulary, vocabulary) for k in top_k]
    best = scaled.topk(max([count for count in kept if count < vocabulary], default=1), dim=-1).values
    floors = [row[count - 1] if count < vocabulary else row.new_tensor(-torch.inf) for row, count in zip(best, kept, strict=True)]
    return scaled.masked_fill(scaled < torch.stack(floors).unsqueeze(1), -torch.inf)


def _keep_top_p(weights: torch.Tensor, top_p: float) -> None:
    """Zero, in place, all of a row outside the smallest set of largest weights that holds the share top_p of their sum.

    Equals of the smallest kept stay.
    """
    total = weights.sum()
    # Only these need sorting: all the smaller ones together are less than the share that is left out.
    candidates = weights[weights >= total * ((1.0 - top_p) / len(weights))].sort(descending=True).values
    before = candidates.cumsum(dim=0) - candidates
    kept = (before < top_p * total).sum().clamp(min=1)
    weights.masked_fill_(weights < candidates[kept - 1], 0.0)


def _with_logprobs(logits: torch.Tensor, states: Sequence[SamplerState], chosen: list[int]) -> list[Drawn]:
    drawn = [Drawn(token_id, None, ()) for token_id in chosen]
    wanted = [index for index, state in enumerate(states) if state.params.logprobs is not None]
    if not wanted:
        return drawn
    logprobs = logits[wanted].log_softmax(dim=-1)
    alternatives = min(max(states[index].params.logprobs or 0 for index in wanted), logits.shape[-1])
    best = logprobs.topk(alternatives, dim=-1)
    own = logprobs.gather(-1, torch.tensor([[chosen[index]] for index in wanted], device=logits.device)).squeeze(1).tolist()
    for index, logprob, ids, values in zip(wanted, own, best.indices.tolist(), best.values.tolist(), strict=True):
        asked = states[index].params.logprobs
        drawn[index] = Drawn(chosen[index], logprob, tuple(zip(ids, values, strict=True))[:asked])
    return drawn
