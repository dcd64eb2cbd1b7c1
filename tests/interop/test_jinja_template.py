"""The exported Jinja template writes what `chat_template.render` does."""

import pytest

from stepjax.interop.export_files import chat_template
from stepjax.processing import templates
from stepjax.processing.chat_template import ImageSegment, SpecialSegment, generation_prompt, render

TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "f", "arguments": {"x": [1, "ä"], "y": None}}}
USER = {"role": "user", "content": "Hi"}
CONVERSATIONS = {
    "plain": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hello"}, USER],
    "images": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}],
    "reasoning": [
        USER,
        {"role": "assistant", "content": "<think>\nearlier\n</think>\n\nFirst"},
        USER,
        {"role": "assistant", "content": "\nSecond", "reasoning_content": "\nlater\n"},
    ],
    "reasoning in the content": [
        USER,
        {"role": "assistant", "content": "<think>a</think>b</think>\n\nc"},
        {"role": "assistant", "content": "before <think>a</think> after"},
        {"role": "assistant", "content": "no opening</think>\nafter"},
    ],
    "calls": [
        USER,
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, {"name": "g", "arguments": '{"a":1}'}]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "h"}]},
        {"role": "tool", "content": "three"},
    ],
}


def text_of(segments):
    def of(segment):
        if isinstance(segment, ImageSegment):
            return "<im_patch>"
        return segment.name if isinstance(segment, SpecialSegment) else segment.text

    return "".join(map(of, segments))


def rendered(messages, *, starts_thinking=True, **variables):
    template = chat_template(starts_thinking=starts_thinking)
    return templates.render(template, {"messages": messages, **variables}, name="the template", is_chat=True)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_written_alike(name, tools):
    messages = CONVERSATIONS[name]
    ours = text_of(render(messages, tools=tools))
    assert rendered(messages, tools=tools, add_generation_prompt=False) == ours


@pytest.mark.parametrize("starts_thinking", [False, True])
@pytest.mark.parametrize("enable_thinking", [None, False, True])
def test_generation_prompts_are_alike(starts_thinking, enable_thinking):
    variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    ours = text_of(
        [*render([USER]), *generation_prompt(starts_thinking=starts_thinking, enable_thinking=enable_thinking)]
    )
    written = rendered([USER], starts_thinking=starts_thinking, add_generation_prompt=True, **variables)
    assert written == ours
