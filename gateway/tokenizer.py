"""Text to token ids, and messages to text: a checkpoint's tokenizer.json and chat template, off the loop where it takes long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from cluster.errors import InvalidModel, InvalidRequest, Overloaded
from cluster.fleet import ModelSpec
from cluster.token_bytes import from_byte_fallback, from_byte_level

INLINE_CHARS = 4096  # About a millisecond; longer texts go to a thread, where the tokenizer lets go of the interpreter's lock.
MAX_ENCODING = 64  # Long texts in or before the thread; beyond that 429.
THREADS = 1


class ChatTokenizer:
    """One model's. `vocabulary`: its size, special tokens included."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, special: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._template = None if template is None else _environment().from_string(template)
        self._special = special
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")
        self._encoding = 0
        self.vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
        self._byte_level = tokenizer.decoder is not None and b'"ByteLevel"' in tokenizer.decoder.__getstate__()

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """special: add what the checkpoint puts around a text; a chat template has already done so."""
        if len(text) <= INLINE_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        if self._encoding >= MAX_ENCODING:
            raise Overloaded(f"{self._encoding} long texts are being encoded, as many as may")
        self._encoding += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: self._tokenizer.encode(text, add_special_tokens=special).ids)
        finally:
            self._encoding -= 1

    def token_bytes(self, token_id: int, text: str) -> bytes:
        """A token's bytes. text: as it shows, in which a part of a character shows as U+FFFD."""
        token = self._tokenizer.id_to_token(token_id) if "\ufffd" in text else None
        if token is None:
            return text.encode()
        return from_byte_level(token) if self._byte_level else from_byte_fallback(token, ())

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as text, ready for the assistant's turn. Raises InvalidRequest where the template refuses it."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions", param="model", code="no_chat_template")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special)
        except Exception as error:  # A template's code may fail in any way; whatever it was, these messages caused it.
            raise InvalidRequest(f"the chat template refuses the messages: {error}", param="messages") from error


def load_tokenizer(model: ModelSpec) -> ChatTokenizer:
    """Raises InvalidModel where its files are missing or broken."""
    try:
        tokenizer = Tokenizer.from_file(str(_file(model, "tokenizer.json")))
        config = json.loads(_file(model, "tokenizer_config.json").read_bytes())
        template = _template(config, model)
        special = {name: _text(config[name]) for name in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(name)}
        return ChatTokenizer(tokenizer, template, special)
    except InvalidModel:
        raise
    except Exception as error:  # The tokenizers library raises plain Exception for a broken file.
        raise InvalidModel(f"tokenizer of {model.name} in {model.path}: {error}") from error


def _file(model: ModelSpec, name: str) -> Path:
    path = Path(model.path) / name
    if path.is_file():
        return path
    if Path(model.path).exists():
        raise InvalidModel(f"{path} is missing")
    try:
        return Path(hf_hub_download(model.path, name, revision=model.revision or None))
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise InvalidModel(f"{name} of {model.path}: {error}") from error


def _template(config: Mapping[str, Any], model: ModelSpec) -> str | None:
    """transformers keeps it in a file of its own, which goes first, or in the config as one text or a list of named ones."""
    try:
        return _file(model, "chat_template.jinja").read_text(encoding="utf-8")
    except InvalidModel:
        template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    return {row["name"]: row["template"] for row in template}.get("default")


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here its body is all there is to it."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders templates (utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
