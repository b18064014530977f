"""Chat templates give what transformers gives."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.errors import InvalidModel, InvalidRequest
from cluster.fleet import ModelSpec
from gateway.tokenizer import load_tokenizer
from tests.gateway.fake_fleet import tokenizer

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + "
    "content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>"
    "\n\n' }}{% endif %}"
)
LLAMA_3_1 = """{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{% if loop.index > 5 %}{% break %}{% endif %}{{ {'é': message.content} | tojson }}{% endif %}\n{% endfor %}"
)
MESSAGES = [
    {"role": "system", "content": " Be <kind>. "},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
    {"role": "user", "content": "Why?", "name": "ann"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def loaded(tmp_path):
    """A tokenizer with a template in its config, or in a file of its own, or both."""

    def load(template=None, file: str | None = None):
        tokenizer().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"chat_template": template}))
        if file is not None:
            (tmp_path / "chat_template.jinja").write_text(file)
        return load_tokenizer(ModelSpec(name="m", path=str(tmp_path)))

    return load


@pytest.mark.parametrize("template", [LLAMA_3, LLAMA_3_1, QWEN_3, MARKED], ids=["llama-3", "llama-3.1", "qwen3", "marked"])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:2]], ids=["conversation", "one"])
def test_a_template_says_what_it_says_in_transformers(loaded, template, messages):
    expected, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **SPECIAL)
    assert [loaded(template).render(messages)] == expected


def test_a_template_in_a_file_of_its_own_goes_before_the_configs(loaded):
    assert loaded("from the config", "from the file").render(MESSAGES) == "from the file"
    assert loaded([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "f").render(MESSAGES) == "f"


def test_the_default_is_taken_of_many_templates(loaded):
    assert loaded([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]).render(MESSAGES) == "d"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('alternate') }}", "{{ messages[0].content + 1 }}", "{{ messages[9].content }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_fails_refuses_the_messages(loaded, template):
    with pytest.raises(InvalidRequest, match="chat template refuses the messages") as caught:
        loaded(template).render(MESSAGES)
    assert caught.value.param == "messages"


def test_a_template_may_not_reach_outside_its_sandbox(loaded):
    with pytest.raises(InvalidRequest):
        loaded("{{ messages.__class__.__mro__[1].__subclasses__() }}").render(MESSAGES)


def test_a_model_without_a_template_says_where_to_go(loaded):
    with pytest.raises(InvalidRequest, match="use /v1/completions"):
        loaded().render(MESSAGES)


def test_a_template_that_does_not_parse_is_an_invalid_model(loaded):
    with pytest.raises(InvalidModel, match="tokenizer of m"):
        loaded("{% if %}")


@pytest.fixture
def byte_level(tmp_path):
    """A tokenizer whose tokens are single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return load_tokenizer(ModelSpec(name="m", path=str(tmp_path)))


@given(text=st.text(min_size=1, max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_the_bytes_of_tokens_that_part_characters_make_the_text(byte_level, text):
    ids = await byte_level.encode(text, special=False)
    assert len(ids) == len(text.encode())
    assert b"".join(byte_level.token_bytes(one, "\ufffd") for one in ids) == text.encode()


def test_bytes_of_a_byte_fallback_token_are_those_it_names(tmp_path):
    made = Tokenizer(models.WordLevel({"<0xE2>": 0, "�": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    loaded = load_tokenizer(ModelSpec(name="m", path=str(tmp_path)))
    assert [loaded.token_bytes(one, text) for one, text in ((0, "�"), (1, "�"), (2, "a"))] == [b"\xe2", "�".encode(), b"a"]
