"""A checkpoint directory, opened: full-attention decoders that `transformers` knows, and nothing else.

What a model's attention does is not guessed from its name: one token is run through it, and every layer must ask for plain
attention exactly once; then a few tokens, and the logits must be those that it computes by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils.logging import disable_progress_bar

from cluster.errors import InvalidModel
from cluster.kv import KvLayout, blocks_for
from workers.checkpoint import check_dtype, check_files
from workers.engines.detokenizer import token_table
from workers.engines.torch_engine import attention
from workers.engines.torch_engine.attention import Span, StepAttention
from workers.engines.torch_engine.kv_tensors import KvTensors

TRIAL_TOKENS = 24
TRIAL_CHUNKS = ((0, 16), (16, 23), (23, 24))  # A prompt's first chunk, a later one, and a decode.
TRIAL_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # Of the largest logit; a hundred times the rounding.

_PROBE = "mobula_probe"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")  # Extras of attention that ours does not compute.


class Checkpoint(NamedTuple):
    model: PreTrainedModel
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    layout: KvLayout
    context_tokens: int
    vocabulary: int


def load(path: str, *, block_tokens: int, dtype: str, device: torch.device) -> Checkpoint:
    """Raises InvalidModel, naming the file or the feature at fault, or InvalidConfig."""
    directory = Path(path)
    check_dtype(dtype, device.type)
    config = _config(directory)
    _refuse_unsupported(config, directory)
    check_files(directory)
    tokenizer = _tokenizer(directory)
    model = _model(directory, config, dtype).to(device).eval()
    ids = (torch.arange(TRIAL_TOKENS, device=device) % config.vocab_size).unsqueeze(0)
    expected = _own_logits(model, ids, directory)
    layout = _probe(model, config, block_tokens, dtype, directory)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    _try(model, ids, expected, layout, directory)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(model),
        layout=layout,
        context_tokens=config.max_position_embeddings,
        vocabulary=config.vocab_size,
    )


def _config(directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").is_file():
        raise InvalidModel(f"{directory / 'config.json'} is missing")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # The library raises whatever a wrong value makes its code run into.
        raise InvalidModel(f"{directory / 'config.json'}: {_reason(error)}") from error


def _refuse_unsupported(config: PretrainedConfig, directory: Path) -> None:
    where = f"{config.model_type} in {directory}"
    if config.is_encoder_decoder:
        raise InvalidModel(f"{where} is an encoder-decoder; only full-attention decoders are served")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InvalidModel(f"{where} is no causal language model")
    layers = getattr(config, "layer_types", None) or ()
    if other := sorted(set(layers) - {"full_attention"}):
        raise InvalidModel(f"{where} has layers of type {', '.join(other)}; only full_attention is served")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise InvalidModel(f"{where} has sliding_window {window}; only full attention is served")
    if not getattr(config, "max_position_embeddings", None):
        raise InvalidModel(f"{where} has no max_position_embeddings; only full-attention decoders are served")
    if (rope := getattr(config, "rope_parameters", None)) and rope.get("rope_type") == "longrope":
        raise InvalidModel(f"{where} has longrope positions, which change with what else is in a batch")
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise InvalidModel(f"{where} is quantised ({method}); only plain weights are served")


def _tokenizer(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises bare Exceptions.
        raise InvalidModel(f"{file} does not parse: {error}") from error
    try:
        token_table(tokenizer)
    except InvalidModel as error:
        raise InvalidModel(f"{file}: {error}") from None
    return tokenizer


def _model(directory: Path, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # The library raises whatever a wrong value makes its code run into.
        raise InvalidModel(f"{directory}: {_reason(error)}") from error
    if unlike := sorted(report["mismatched_keys"]):
        name, stored, wanted = unlike[0]
        raise InvalidModel(f"{directory}: {name} has shape {list(stored)}, by config.json {list(wanted)}")
    if missing := sorted(report["missing_keys"]):
        raise InvalidModel(f"{directory} lacks {len(missing)} weights, {missing[0]} first")
    return model


def _own_logits(model: PreTrainedModel, ids: torch.Tensor, directory: Path) -> torch.Tensor:
    """Of the last token, by the attention that the model comes with."""
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    except Exception as error:  # As above.
        raise InvalidModel(f"{directory} does not compute {TRIAL_TOKENS} tokens: {_reason(error)}") from error
    if not logits.isfinite().all():
        raise InvalidModel(f"{directory} computes logits that are not finite: its weights are broken")
    return logits


def _try(model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor, layout: KvLayout, directory: Path) -> None:
    """Refuse a model in which our attention gives other logits: its positions, masks or biases are not plain."""
    kv = KvTensors(layout, blocks_for(TRIAL_TOKENS, layout.block_tokens), model.device)
    table = np.arange(kv.blocks)
    where = f"{model.config.model_type} in {directory}"
    try:
        with torch.inference_mode():
            for start, end in TRIAL_CHUNKS:
                logits = model(
                    input_ids=ids[:, start:end],
                    position_ids=torch.arange(start, end, device=model.device).unsqueeze(0),
                    use_cache=False,
                    paged_step=StepAttention(kv, [Span(table, start, end - start)]),
                ).logits[0, -1]
    except Exception as error:  # As above.
        raise InvalidModel(f"{where} does not take paged attention: {_reason(error)}") from error
    difference = (logits.float() - expected).abs().max() / expected.abs().max()
    if not difference <= TRIAL_TOLERANCE[layout.dtype]:
        raise InvalidModel(f"{where} attends otherwise than plainly: paged, its logits differ by {difference:.0%} of the largest")


def _probe(model: PreTrainedModel, config: PretrainedConfig, block_tokens: int, dtype: str, directory: Path) -> KvLayout:
    """Run one token; learn the layout, and refuse what does not attend as `attention` does."""
    calls: list[tuple[int, torch.Size, torch.Size, list[str]]] = []

    def record(module, query, key, value, attention_mask, **extra):  # type: ignore[no-untyped-def]
        unsupported = [name for name in _UNSUPPORTED if extra.get(name) is not None]
        calls.append((module.layer_idx, key.shape, value.shape, unsupported))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    AttentionInterface.register(_PROBE, record)
    AttentionMaskInterface.register(_PROBE, lambda *_, **__: None)
    where = f"{config.model_type} in {directory}"
    try:
        model.set_attn_implementation(_PROBE)
        with torch.inference_mode():
            model.base_model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidModel(f"{where} does not take another attention: {_reason(error)}") from error
    layers = config.num_hidden_layers
    if not calls or [call[0] for call in calls] != list(range(layers)):
        raise InvalidModel(f"{where} attends in {len(calls)} of {layers} layers; only full-attention decoders are served")
    if extras := sorted({name for call in calls for name in call[3]}):
        raise InvalidModel(f"{where} attends with {', '.join(extras)}; only plain full attention is served")
    if len({shape for call in calls for shape in call[1:3]}) > 1:
        raise InvalidModel(f"{where} has keys and values of unlike shapes; only plain full attention is served")
    _, kv_heads, _, head_dim = calls[0][1]
    return KvLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_tokens=block_tokens)


def _reason(error: Exception) -> str:
    """An error's own words, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    given = model.generation_config.eos_token_id
    if given is None:
        given = model.config.eos_token_id
    if given is None:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else given)
