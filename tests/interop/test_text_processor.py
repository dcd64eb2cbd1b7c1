"""Text models' tokenizers and templates: what is read of a directory, and what the template sees of a request."""

import json
import os

import pytest

from stepjax.errors import CheckpointError, TokenError
from stepjax.interop.text_processor import TextProcessor
from stepjax.processing.tokenizer import load_tokenizer

DEMO = load_tokenizer("demo")
END, TURN_END = DEMO.special("<|endoftext|>"), DEMO.special("<|im_end|>")
USER = {"role": "user", "content": "hi"}
CALL = {"id": "abc123456", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "ä"]}'}}
HISTORY = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abc123456", "name": "f", "content": "7"},
]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture
def directory(tmp_path):
    DEMO.save(tmp_path / "tokenizer.json")
    return tmp_path


def processor(directory, **files):
    """Of a directory with further files; JSON unless they are texts."""
    for name, content in files.items():
        name = ".".join(name.replace("__", "/").rsplit("_", 1))  # of keywords
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return TextProcessor.from_directory(directory)


def rendered(template, messages=(USER,), **options):
    text = TextProcessor(None, chat_template=template, special={"bos_token": "<s>"})  # type: ignore[arg-type]
    return text.render(messages, **options)


# What a template sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "options", "expected"),
    [
        (PLAIN, HISTORY, {}, "[user]hi[assistant][tool]7"),
        ("{% if tools is not none %}TOOLS{% endif %}x", [USER], {}, "x"),
        ("{{ tools is none }}{{ documents is none }}", [USER], {"tools": [], "documents": []}, "TrueTrue"),
        (
            "{{ tools[0].function.name }}{{ documents[0].text }}",
            [USER],
            {"tools": TOOLS, "documents": [{"text": "d"}]},
            "fd",
        ),
        ("{{ messages[2].tool_call_id }}/{{ messages[2].name }}", HISTORY, {}, "abc123456/f"),
        ("{{ messages[1].tool_calls[0].function.arguments.x[1] }}", HISTORY, {}, "ä"),
        ("{{ messages[1].tool_calls[0].id }}", HISTORY, {}, "abc123456"),
        (
            "{% for c in messages[0].tool_calls %}{{ c.arguments }}{% endfor %}",
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"name": "f", "arguments": " "}, {"name": "g", "arguments": {"a": 1}}],
                }
            ],
            {},
            "{}{'a': 1}",
        ),
        (
            PLAIN,
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            {},
            "[user]a\nb",
        ),
        ("{{ messages[0].name is defined }}", [{**USER, "name": None}], {}, "False"),
        ("{{ messages[0].thinking }}", [{"role": "assistant", "content": "", "reasoning_content": "hm"}], {}, "hm"),
        ("{{ messages[0].reasoning_content }}", [{"role": "assistant", "content": "", "reasoning": "hm"}], {}, "hm"),
        ("{{ bos_token }}{{ add_generation_prompt }}", [USER], {}, "<s>True"),
        ("{{ enable_thinking is defined }}", [USER], {}, "False"),
        ("{{ enable_thinking }}", [USER], {"enable_thinking": False}, "False"),
        ({"tool_use": "T", "default": "D"}, [USER], {}, "D"),
        ({"tool_use": "T", "default": "D"}, [USER], {"tools": TOOLS}, "T"),
    ],
)
def test_templates_see_what_they_were_written_for(template, messages, options, expected):
    assert rendered(template, messages, **options) == expected


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hi", r"messages\[0\]='hi': give a dict"),
        ({"role": "user", "content": 7}, r"messages\[0\].content=7: give a string"),
        (
            {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
            r"messages\[0\].content\[0\]=.*reads text",
        ),
        ({"role": "assistant", "tool_calls": ["f"]}, r"messages\[0\].tool_calls\[0\]='f'"),
        *(
            ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": bad}]}, r"tool_calls\[0\].arguments=")
            for bad in ("{", "[1]", "7", [1], "[" * 100_000)
        ),
    ],
)
def test_messages_that_no_template_can_show(message, reason):
    with pytest.raises(TokenError, match=reason):
        rendered(PLAIN, [message])


def test_the_template_is_named():
    with pytest.raises(TokenError, match="the chat template 'tool_use' cannot render: line 1: ZeroDivisionError"):
        rendered({"tool_use": "{{ 1 / 0 }}", "default": ""}, tools=TOOLS)
    with pytest.raises(TokenError, match="no chat template is named 'default', only tool_use, rag"):
        rendered({"tool_use": "", "rag": ""})


# Directories ----------------------------------------------------------------------------------------------------------

NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"tokenizer_config_json": {"chat_template": "C"}}, {"default": "C"}),
        ({"tokenizer_config_json": {"chat_template": NAMED}}, {"tool_use": "T", "default": "D"}),
        (
            {"tokenizer_config_json": {"chat_template": "C"}, "chat_template_json": {"chat_template": "J"}},
            {"default": "J"},
        ),
        ({"tokenizer_config_json": {"chat_template": NAMED}, "chat_template_jinja": "F"}, {"default": "F"}),
        (
            {"chat_template_jinja": "F", "additional_chat_templates__tool_use_jinja": "U"},
            {"default": "F", "tool_use": "U"},
        ),
    ],
)
def test_chat_templates_of_a_directory(directory, files, expected):
    assert processor(directory, **files).chat_templates == expected


@pytest.mark.parametrize("template", [7, [{"name": "default"}], ["text"], [{"name": "default", "template": None}]])
def test_chat_templates_that_are_none(directory, template):
    with pytest.raises(CheckpointError, match="chat_template=.*give a string, or a list of name and template"):
        processor(directory, tokenizer_config_json={"chat_template": template})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config_json": {"eos_token_id": END}}, (END,)),
        ({"config_json": {"text_config": {"eos_token_id": [END]}}}, (END,)),
        ({"tokenizer_config_json": {"eos_token": "<|im_end|>"}}, (TURN_END,)),
        ({"tokenizer_config_json": {"eos_token": {"content": "<|im_end|>"}}}, (TURN_END,)),
        ({"special_tokens_map_json": {"eos_token": {"content": "<|im_end|>"}}}, (TURN_END,)),
        ({"tokenizer_config_json": {"eos_token": "<|nowhere|>"}}, ()),
        (
            {
                "generation_config_json": {"eos_token_id": [7, END]},
                "config_json": {"eos_token_id": END},
                "tokenizer_config_json": {"eos_token": "<|im_end|>"},
            },
            (7, END, TURN_END),
        ),
    ],
)
def test_stop_tokens_are_those_of_every_file(directory, files, expected):
    assert processor(directory, **files).stop_ids == expected


@pytest.mark.parametrize("value", ["7", 1.5, True, [None], {"a": 1}])
def test_stop_tokens_that_are_no_ids(directory, value):
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id=.*whole number"):
        processor(directory, generation_config_json={"eos_token_id": value})


def test_special_tokens_by_name(directory):
    fields = {"bos_token": "<s>", "pad_token": {"content": "<p>"}, "unk_token": None, "add_bos_token": True}
    assert processor(directory, tokenizer_config_json=fields).special == {"bos_token": "<s>", "pad_token": "<p>"}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_pipes_are_not_waited_for(directory, name):
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is not a regular file"):
        TextProcessor.from_directory(directory)


def test_files_that_are_broken(directory):
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        processor(directory, config_json="[" * 200_000)
