"""`processing.chat_template` as a Jinja template, for servers that render conversations themselves.

The same text, without the wall between text and control tokens: there is one string, and who writes `<|im_end|>` in a
message ends a turn. An image is one `<im_patch>`, which their processors expand.
"""

_TEMPLATE = r"""{%- macro shown(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content is not none -%}
{%- for item in content -%}
{%- if item.type == 'text' -%}{{- item.text -}}{%- else -%}{{- '<im_patch>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0].role == 'system' -%}{{- shown(messages[0].content) + '\n\n' -}}{%- endif -%}
{{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
{{- '\n</tools>\n\nFor each function call, return a json object with function name ' -}}
{{- 'and arguments within <tool_call></tool_call> XML tags:\n' -}}
{{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + shown(message.content) + '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{%- set content = shown(message.content) | string -%}
{%- set reasoning = message.reasoning_content -%}
{%- if reasoning is not string and '</think>' in content -%}
{%- set pieces = content.split('</think>') -%}
{%- set head = pieces[:-1] | join('</think>') -%}
{%- set content = pieces[-1].lstrip('\n') -%}
{%- set reasoning = head.strip('\n') -%}
{%- if '<think>' in head -%}
{%- set before = head.split('<think>')[0] -%}
{%- set reasoning = (head.split('<think>')[1:] | join('<think>')).strip('\n') -%}
{%- if before.strip() -%}{%- set content = before + content -%}{%- endif -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if reasoning is string -%}
{%- set content = content.lstrip('\n') -%}
{%- if loop.index0 > ns.last_user -%}{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n' -}}{%- endif -%}
{%- endif -%}
{{- content -}}
{%- for call in message.tool_calls or [] -%}
{%- if content or not loop.first -%}{{- '\n' -}}{%- endif -%}
{%- set function = call.function or call -%}
{{- '<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' -}}
{%- if function.arguments is string -%}{{- function.arguments -}}
{%- else -%}{{- (function.arguments or {}) | tojson -}}{%- endif -%}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif not (tools and loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\n' + shown(message.content) + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is not none -%}
{{- '<think>\n' if enable_thinking else '<think>\n\n</think>\n' -}}
{%- elif STARTS_THINKING -%}
{{- '<think>\n' -}}
{%- endif -%}
{%- endif -%}
"""


def jinja_template(*, starts_thinking: bool) -> str:
    """The template's text; see `chat_template.generation_prompt` for `starts_thinking`."""
    return _TEMPLATE.replace("STARTS_THINKING", "true" if starts_thinking else "false")
