"""Problems from files: all the forms they come in, and every mistake named with its file and line."""

import json

import pytest
from PIL import Image

from stepjax.errors import RecordError
from stepjax.pacore.problems import read_problems

ASK = [{"role": "user", "content": "What is 6 x 7?"}]


@pytest.fixture
def write(tmp_path):
    def write(*records, name="p.jsonl"):
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n" if name.endswith("l") else json.dumps(list(records)))
        return path

    return write


def test_all_forms_of_records(write):
    path = write(
        {"messages": ASK, "id": "a", "ground_truth": 42, "category": "sums"},
        "",
        {"conversation": ASK, "responses": ["41", {"content": "so</think> 42"}, "<think>never ends</think>"]},
        {"problem": "What is 6 x 7?", "tools": [{"type": "function"}], "id": 7},
    )
    read = read_problems(path)
    assert [problem.id for problem in read.problems] == ["a", "req_1", "7"]
    assert all(list(problem.messages) == ASK for problem in read.problems)
    assert read.problems[0].ground_truth == 42 and read.problems[0].extra == {"category": "sums"}
    assert read.problems[1].responses == () and "--use-responses" in read.notes[0]
    assert read.problems[2].tools == ({"type": "function"},)
    used = read_problems(path, use_responses=True)
    assert used.problems[1].responses == ("41", "42") and "1 of the responses" in used.notes[0]
    assert used.digest != read.digest
    assert [problem.id for problem in read_problems(path, limit=2).problems] == ["a", "req_1"]


def test_a_list_in_a_json_file(write):
    path = write({"messages": ASK}, {"messages": ASK}, name="p.json")
    assert [problem.id for problem in read_problems(path).problems] == ["req_0", "req_1"]


def test_lines_end_where_json_lines_end(write):
    """U+2028 may stand unescaped in JSON, and `str.splitlines` would break there."""
    path = write(json.dumps({"problem": "one\u2028two"}, ensure_ascii=False))
    assert read_problems(path).problems[0].messages[0]["content"] == "one\u2028two"


def test_the_digest_is_of_what_is_asked(write):
    def digest(**fields):
        return read_problems(write({"messages": ASK, "id": "a", **fields})).digest

    assert digest() == digest(ground_truth=3, category="x"), "answers may be corrected, and a run goes on"
    assert digest() != digest(id="b") and digest() != digest(messages=[*ASK, *ASK])


def test_images_are_found_beside_the_file(write, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a b.png")
    file = str(tmp_path / "images" / "a b.png")
    uri = "data:image/png;base64,AAAA"
    content = [
        {"type": "image", "image": "images/a b.png"},
        {"type": "image_url", "image_url": {"url": "images/a b.png"}},
        {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/images/a%20b.png"}},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}},
        {"type": "text", "text": "What is it?"},
    ]
    [problem] = read_problems(write({"messages": [{"role": "user", "content": content}]})).problems
    made = problem.messages[0]["content"]
    assert made[:3] == [{"type": "image", "image": file}] * 3 and made[3:] == content[3:]


@pytest.mark.parametrize(
    "record, part",
    [
        ("{", "line 2: not JSON"),
        ('{"problem": NaN}', "line 2: not JSON"),
        ("3", "line 2: 3 is not a problem"),
        ({}, "has only nothing: give one of"),
        ({"messages": ASK, "problem": "x"}, "has messages and problem: give one of"),
        ({"messages": "x", "id": "a"}, "id 'a' is already used in line 1"),
        ({"messages": 3}, "messages is 3"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["x"]}, r"messages\[0\] is 'x'"),
        ({"messages": [{"role": "human", "content": "x"}]}, "role='human'"),
        ({"messages": [{"role": "user"}]}, "content=None"),
        ({"messages": [*ASK, {"role": "assistant", "content": "42"}]}, "role='assistant': PaCoRe answers"),
        ({"messages": ASK, "tools": ["x"]}, "tools is"),
        ({"messages": ASK, "responses": "x"}, "responses is 'x'"),
        ({"messages": ASK, "responses": [3]}, r"responses\[0\] is 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]},
            "image file .* does not",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "None is not an image"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "give a text, or items"),
    ],
)
def test_mistakes_name_the_line(write, record, part):
    with pytest.raises(RecordError, match=rf"p\.jsonl, line 2.*{part}" if "line" not in part else part):
        read_problems(write({"messages": ASK, "id": "a"}, record), use_responses=True)


def test_files_that_cannot_be_used(write, tmp_path):
    for path, part in [
        (tmp_path / "none.jsonl", "cannot be read"),
        (tmp_path / "p.csv", "give a .jsonl file"),
        (write(name="p.jsonl"), "has no problems"),
        (write(name="p.json"), "has no problems"),
    ]:
        with pytest.raises(RecordError, match=part):
            read_problems(path)
    (tmp_path / "q.json").write_text('{"a": 1}')
    with pytest.raises(RecordError, match="must hold a list"):
        read_problems(tmp_path / "q.json")
    with pytest.raises(RecordError, match="no problem has responses"):
        read_problems(write({"messages": ASK}), use_responses=True)
