"""Chat templates of the public models' kinds, rendered here and by Transformers: the same text."""

import json

import pytest
import transformers

from stepjax.interop.text_processor import TextProcessor
from stepjax.processing.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Tools in the first user's turn, calls by their objects, dates and refusals: as in Llama 3.
LLAMA = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n" + system_message + eos_token }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + eos_token }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' + tool_call.arguments | tojson + "}" + eos_token }}
    {%- elif message.role == "tool" %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""
# A namespace, identifiers of calls that have nine letters, tools before the last user's turn: as in Mistral's.
MISTRAL = r"""{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == "user" %}
        {%- if tools is not none and loop.index0 == ns.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + m.content + "[/INST]" }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- "[TOOL_CALLS] [" + (call.function|tojson)[:-1] + ', "id": "' + call.id + '"}]' + eos_token }}
        {%- endfor %}
    {%- elif m.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content|string + ', "call_id": "' + m.tool_call_id + '"}' }}
    {%- else %}{{- " " + m.content + eos_token }}{%- endif %}
{%- endfor %}
"""
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.reasoning_content or '' }}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
    "{{ documents is none }}{{ enable_thinking is defined }}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Llama": LLAMA,
    "Mistral": MISTRAL,
    "marked": MARKED,
    "named": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": LLAMA}],
}

USER = {"role": "user", "content": " What is 6 x 7? <ü> "}
CALL = {"id": "abc123456", "type": "function", "function": {"name": "f", "arguments": {"x": [6, "ä"], "y": None}}}
CONVERSATIONS = {
    "one turn": [USER],
    "turns": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "42"}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "42", "reasoning": "hm"}, USER],
    "a call": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abc123456", "name": "f", "content": "42"},
    ],
    "a bad identifier": [USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "a"}, CALL]}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "größer", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    load_tokenizer("demo").save(directory / "tokenizer.json")
    fields = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATES[request.param]}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return TextProcessor.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_templates_write_what_transformers_writes(pair, name, tools):
    ours, theirs = pair

    def outcome(render):
        try:
            return render(CONVERSATIONS[name], tools=tools, add_generation_prompt=True)
        except Exception as error:
            return str(error)

    written = outcome(lambda *args, **options: theirs.apply_chat_template(*args, **options, tokenize=False))
    said = outcome(ours.render)
    assert said == written or said.endswith(f"refuses the conversation: {written}")


def test_requests_are_read_as_objects(pair):
    """A server's null content and JSON arguments are what a caller of Transformers gives as "" and an object."""
    ours, theirs = pair
    *before, made, result = CONVERSATIONS["a call"]
    call = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    sent = [*before, {**made, "content": None, "tool_calls": [call]}, {**result, "reasoning_content": None}]
    written = theirs.apply_chat_template([*before, made, result], tools=TOOLS, tokenize=False)
    assert ours.render(sent, tools=TOOLS, add_generation_prompt=False) == written
