"""The synthesis prompt: its published structure to the letter of its white space, images, tools, other templates."""

import pytest

from stepjax.errors import ConfigError, RecordError
from stepjax.processing.synthesis import Template

REFERENCES = ["It is 42.", "Six times seven\n\nmakes 42."]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def rendered(content, references=REFERENCES, role="user", before=(), **fields):
    messages = [*before, {"role": role, "content": content}]
    return Template(**fields).conversation(messages, references)


def test_the_prompt_has_the_published_structure():
    [message] = rendered("What is 6 x 7?\n")
    lines = message["content"].split("\n")
    goal, closing = lines[0], lines[-1]
    assert "reference answers" in goal and goal.endswith(".") and "your own" in closing
    assert lines[1:-1] == [
        *("", "Problem:", "What is 6 x 7?", ""),
        *("", "Reference answers:"),
        *("", "Reference 1:", "It is 42."),
        *("", "Reference 2:", "Six times seven", "", "makes 42."),
        *("", ""),
    ]


def test_without_references_nothing_is_changed():
    messages = ({"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},)
    assert Template().conversation(messages, []) == messages


def test_text_that_looks_like_a_template_stays_text():
    [message] = rendered("{{ 7 * 6 }} {% if %}", ["{{ references }}"])
    assert "{{ 7 * 6 }} {% if %}" in message["content"] and "{{ references }}" in message["content"]


def test_turns_before_the_last_stay_as_they_are():
    before = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
    )
    *same, last = rendered("And its colour?", before=before)
    assert tuple(same) == before and "And its colour?" in last["content"]


@pytest.mark.parametrize("position, kinds", [("before", ["image_url", "text"]), ("after", ["text", "image_url"])])
def test_images_are_attached_again(position, kinds):
    content = [{"type": "text", "text": "What is"}, IMAGE, {"type": "text", "text": "this?"}]
    [message] = rendered(content, images=position)
    assert [item["type"] for item in message["content"]] == kinds
    assert IMAGE in message["content"]
    [text] = [item["text"] for item in message["content"] if item["type"] == "text"]
    assert "Problem:\nWhat is\nthis?\n" in text


def test_the_result_of_a_tool_is_not_called_a_problem():
    before = ({"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [{}]})
    *_, last = rendered("12 degrees", role="tool", before=before)
    assert last["role"] == "tool" and "Tool result:\n12 degrees\n" in last["content"]
    assert "next steps" in last["content"] and "Problem:" not in last["content"]


def test_proposed_calls_are_said_not_to_have_run():
    [without] = rendered("Weather?")
    [proposed] = rendered("Weather?", ["<tool_call>\n<function=f>\n</function>\n</tool_call>"])
    assert "none of them has been run" in proposed["content"] and "has been run" not in without["content"]


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ role }}: {{ problem }}{% for r in references %} [{{ loop.index }}] {{ r }}{% endfor %}")
    [message] = rendered("why?", ["so", "thus"], template=str(file))
    assert message["content"] == "user: why? [1] so [2] thus"


def test_the_short_template():
    [message] = rendered("What is 6 x 7?", template="short")
    assert message["content"] == "What is 6 x 7?\nRef 1 It is 42.\nRef 2 Six times seven\n\nmakes 42."


@pytest.mark.parametrize("text", ["{{ problem", "{{ nothing }}", "{{ problem.__class__.__mro__ }}"])
def test_templates_that_cannot_be_used(tmp_path, text):
    file = tmp_path / "t.jinja"
    file.write_text(text)
    with pytest.raises(ConfigError, match="it may use problem, references"):
        Template(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        Template(str(tmp_path / "nothing"))


@pytest.mark.parametrize("content", [None, 3, [{"type": "input_audio"}], [{"text": "no type"}]])
def test_content_that_is_neither_text_nor_images(content):
    with pytest.raises(RecordError, match="give a text"):
        rendered(content)
