"""The trace page: what it says, that nothing gets out of it, and how it looks and behaves in a real browser."""

import asyncio
import dataclasses
import html.parser
import itertools
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_sampler import FakeSampler
from trace_examples import HOSTILE, answering, changed, drawing, outcome, problem

from stepjax.errors import CheckpointError
from stepjax.pacore.baselines import Method, answer
from stepjax.pacore.compaction import citations, find_citations
from stepjax.pacore.config import PacoreConfig, RoundLimits
from stepjax.pacore.coordinator import Coordinator, RoundFailedError
from stepjax.pacore.records import Outcome, Problem, Trajectory
from stepjax.pacore.trace import MOST_SHOWN, table_entry, trace_data, trace_html, write_table, write_trace
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import SamplerError

PICTURES = os.environ.get("STEPJAX_PAGE_PICTURES")  # a folder to leave screenshots in


class Page(html.parser.HTMLParser):
    """Tags, their attributes, and the text of the elements that hold data and code."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.policy, self.inside = [], {}, None, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        fields = dict(attrs)
        self.tags.append((tag, fields))
        self.inside = fields.get("id") or tag
        if fields.get("http-equiv") == "Content-Security-Policy":
            self.policy = fields["content"]

    def handle_data(self, data):
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


def data_of(text):
    return json.loads(Page(text).texts["data"])


def hostile():
    made = outcome((8, 2))
    rounds = []
    for round_ in made.rounds:
        trajectories = tuple(
            changed(
                each,
                content=each.rollout.content and f"{each.rollout.content} {HOSTILE}",
                reasoning=HOSTILE,
                tool_calls=({"function": {"name": HOSTILE, "arguments": HOSTILE}},),
                error=each.error and HOSTILE,
            )
            for each in round_.trajectories
        )
        messages = tuple(dataclasses.replace(each, text=f"{each.text} {HOSTILE}") for each in round_.messages)
        references = tuple(dataclasses.replace(each, text=f"{each.text} {HOSTILE}") for each in round_.references)
        rounds.append(dataclasses.replace(round_, trajectories=trajectories, messages=messages, references=references))
    asked = Problem(
        id=HOSTILE,
        messages=(
            {"role": HOSTILE, "content": [{"type": "text", "text": HOSTILE}, {"type": "image", "image": HOSTILE}]},
        ),
        tools=({"type": "function", "function": {"name": HOSTILE}},),
        ground_truth=[HOSTILE],
        extra={HOSTILE: HOSTILE},
    )
    return dataclasses.replace(made, problem=asked, rounds=tuple(rounds))


def answer_in(data):
    number, index = data["chosen"]
    return data["rounds"][number]["trajectories"][index]


def test_nothing_gets_out_of_the_data():
    text = trace_html(hostile(), title=HOSTILE)
    page, plain = Page(text), Page(trace_html(outcome((8, 2))))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.texts["style"] == plain.texts["style"] and page.texts["script"] == plain.texts["script"]
    assert page.texts["title"].strip() == HOSTILE
    data = data_of(text)
    assert data["id"] == HOSTILE and answer_in(data)["message"][-1].endswith(HOSTILE)
    assert data["problem"]["messages"][0]["role"] == HOSTILE


@pytest.mark.parametrize(
    "text", ["\u2028\u2029", "\ud800 alone", "\U0001f600 \u53c2\u8003", "\\u003c \\", "a\x00b\r\n"]
)
def test_any_text_comes_through(text):
    made = dataclasses.replace(outcome((2,)), problem=problem(id=text, ground_truth=text))
    page = trace_html(answering(made, content=f"x{text}y"))
    assert answer_in(data_of(page))["message"] == [f"x{text}y"] and "\u2028" not in Page(page).texts["data"]
    assert data_of(page)["problem"]["ground_truth"] == text


def test_a_text_without_measure_is_shown_in_part_and_takes_no_time():
    def call(arguments):
        return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}

    made = outcome((2,))
    for text in ("<" * 20_000_000, '{"a": "' + "x1, " * 5_000_000 + '"}'):
        begin = time.process_time()
        page = trace_html(answering(made, content=text, tool_calls=(call(text),)), matching="math")
        assert time.process_time() - begin < 8
        data = answer_in(data_of(page))
        beginning = f"{text[:MOST_SHOWN]} [... {len(text) - MOST_SHOWN:,} more characters]"
        assert data["tool_calls"][0]["arguments"] == beginning and data["message"] == [beginning]


def test_a_page_stands_alone(tmp_path):
    write_trace(outcome((16,)), tmp_path / "deep" / "trace.html")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["trace.html"]
    page = Page((tmp_path / "deep" / "trace.html").read_text())
    addresses = [value for _, fields in page.tags for name, value in fields.items() if name in ("src", "href")]
    assert addresses == ["data:,"], "the page's icon, so that none is asked for"
    assert page.policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in page.policy and "http" not in page.policy
    assert not re.search(r"https?:|url\(|@import|fetch|XMLHttp|innerHTML", page.texts["style"] + page.texts["script"])


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "trace.html"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(CheckpointError, match="trace.html cannot be written"):
        write_trace(outcome((2,)), path)
    assert path.read_text() == "before"


def test_what_the_data_say():
    made = outcome((16, 4))
    data = data_of(trace_html(made, matching="math"))
    assert data["totals"]["output_tokens"] == made.totals.output_tokens and data["totals"]["calls"] == 21
    first, second, final = data["rounds"]
    states = [each["state"] for each in first["trajectories"]]
    assert states[:9] == ["ok", "ok", "error", "truncated", "empty", "tail", "cut", "cancelled", "ok"]
    assert first["references"] == [] and first["losses"] == {"cancelled": 1, "empty": 1, "error": 1, "truncated": 1}
    # 12 left a message; one of them did not fit, one was shortened, and one is the end of reasoning.
    assert len(second["references"]) == 11 and len(second["left_out"]) == 1
    assert [each["index"] for each in second["references"]] == [each.index for each in made.rounds[1].references]
    assert sorted(each["state"] for each in second["references"]) == ["shortened", "tail", *["whole"] * 9]
    for each, trajectory in zip(second["trajectories"], made.rounds[1].trajectories, strict=True):
        counted = {int(label): times for label, (times, _) in each["citations"].items()}
        assert counted and counted == citations(f"{trajectory.rollout.content}\n{trajectory.rollout.reasoning}", 11)
        written = "".join(part if isinstance(part, str) else part[1] for part in each["message"])
        assert written == trajectory.rollout.content.strip()
    assert final["is_final"] and data["chosen"] == [2, 0]
    assert final["trajectories"][0]["answer"] == "18" and final["trajectories"][0]["correct"] is True
    assert sum(count for _, count in first["answers"]) == 11, "the end of reasoning has no answer"


def test_without_reasoning_and_without_answers():
    text = trace_html(outcome((16,)), reasoning=False)
    assert "legs seem to be" not in text
    data = data_of(text)
    assert all(not each["reasoning"] and each["answer"] is None for each in data["rounds"][0]["trajectories"])
    assert data["rounds"][1]["trajectories"][0]["citations"], "citations in the reasoning are counted all the same"


def test_reasoning_in_the_content_is_parted():
    made = outcome((2,), troubled=False)
    made = answering(made, content="<think>hm, Reference 1</think>\n\n42", reasoning=None)
    answer = answer_in(trace_data(made))
    assert answer["message"] == ["42"] and answer["reasoning"] == ["hm, ", [1, "Reference 1"]]
    assert answer["citations"] == {"1": [1, 1]}


def test_places_of_citations():
    text = "Reference 3 and refs. 1, #2 and 40; preference 1; \u53c2\u8003\u7b54\u6848 2\u548c3"
    found = [(text[start:end], number) for start, end, number in find_citations(text, 4)]
    assert found == [("Reference 3", 3), ("refs. 1", 1), ("2", 2), ("\u53c2\u8003\u7b54\u6848 2", 2), ("3", 3)]
    assert citations(text, 4) == {1: 1, 2: 2, 3: 2}


def test_images_are_shown_small_and_never_fetched(tmp_path):
    (tmp_path / "big.png").write_bytes(drawing(3000, 1000))
    uri = "data:image/png;base64,iVBORw0KGgo="
    content = [
        {"type": "image", "image": str(tmp_path / "big.png")},
        {"type": "image", "image": drawing()},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image", "image": str(tmp_path / "none.png")},
        {"type": "text", "text": "what is it?"},
    ]
    made = dataclasses.replace(outcome((2,)), problem=problem(messages=({"role": "user", "content": content},)))
    big, small, given, remote, none, text = data_of(trace_html(made))["problem"]["messages"][0]["items"]
    assert big["image"].startswith("data:image/") and big["name"] == "big.png, 3000 x 1000 pixels"
    assert len(big["image"]) < 60_000 and small["image"].startswith("data:image/")
    assert given["image"] == uri and text == {"text": "what is it?"}
    assert "https://example.com/a.png" in remote["note"] and "no such file" in none["note"]


def test_numbers_that_are_none():
    made = outcome((2,))
    odd = changed(made.rounds[0].trajectories[0], mean_logprob=float("nan"))
    rounds = (dataclasses.replace(made.rounds[0], trajectories=(odd, made.rounds[0].trajectories[1])), made.rounds[1])
    data = data_of(trace_html(dataclasses.replace(made, rounds=rounds)))
    assert data["rounds"][0]["trajectories"][0]["mean_logprob"] is None


def test_a_page_is_not_much_larger_than_what_it_shows():
    made = outcome((32, 4))
    page = len(trace_html(made))
    code = len(trace_html(Outcome(problem=Problem(id="p", messages=()), error="none")))
    shown = sum(len(json.dumps(each.to_json())) for round_ in made.rounds for each in round_.trajectories)
    assert code < 50_000 and page < code + 2.5 * shown + 100_000


def test_a_problem_that_failed(solve):
    sampler = FakeSampler(lambda asked: SamplerError(HOSTILE, is_temporary=False))
    with pytest.raises(RoundFailedError) as caught:
        solve(sampler, (4,))
    failure = Outcome(problem=problem(), rounds=caught.value.rounds, error=str(caught.value))
    data = data_of(trace_html(failure))
    assert HOSTILE in data["error"] and data["chosen"] is None and len(data["rounds"]) == 1
    assert data_of(trace_html(Outcome(problem=problem(), error="too long")))["rounds"] == []


def aggregated():
    """Recursive self-aggregation: each call of a later round has references of its own."""
    texts = ["I say 1", "I say 2", "I say 3", "I say 4"]

    def script(asked):
        if "Reference 1:" not in asked.text:
            return texts[asked.number]
        first = next(text for text in texts if f"Reference 1:\n{text}" in asked.text)
        return Rollout(content=f"Reference 1 says: {first}", num_tokens=5, finish_reason="stop")

    coordinator = Coordinator(FakeSampler(script), PacoreConfig(schedule=(), limits=RoundLimits(retries=0)))
    asked = Problem(id="p", messages=({"role": "user", "content": "?"},))
    method = Method(name="rsa", width=4, references=2, loops=2)
    # In a thread: playwright keeps an event loop in this one.
    with ThreadPoolExecutor() as pool:
        return texts, pool.submit(asyncio.run, answer(coordinator, asked, method)).result()


def test_references_of_each_call():
    texts, made = aggregated()
    data = trace_data(made)
    second = data["rounds"][1]
    assert second["has_own_references"] and second["left_out"] == []
    cited = []
    for each in second["trajectories"]:
        assert len(each["references"]) == 2
        cited.append(each["references"][0])
        assert each["message"][-1].endswith(texts[cited[-1]])
    assert [each["index"] for each in second["references"]] == sorted(
        {i for e in second["trajectories"] for i in e["references"]}
    )
    assert [each["citations"] for each in second["trajectories"]] == [{"1": [1, 0]}] * 4


def test_trajectories_come_back_from_their_json():
    for round_ in outcome((16,)).rounds:
        for each in round_.trajectories:
            assert Trajectory.from_json(json.loads(json.dumps(each.to_json()))) == each


# In a browser.

SIZES = {"desktop": (1440, 900), "phone": (360, 740)}


@pytest.fixture
def opened_file(browser):
    """A function that opens a page, and notes every error and every request."""
    made = []

    def open_page(path, size="desktop", scheme="light", hash=""):
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        made.append(page)
        page.errors, page.requests = [], []
        page.on("console", lambda message: message.type in ("error", "warning") and page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url[:100]))
        page.goto(path.as_uri() + hash)
        return page

    yield open_page
    for page in made:
        page.close()


@pytest.fixture
def opened(opened_file, tmp_path):
    """A function that opens the page of an outcome."""
    numbers = itertools.count()

    def open_page(of, size="desktop", scheme="light", hash="", **options):
        path = tmp_path / f"{next(numbers)}.html"
        write_trace(of, path, **options)
        return opened_file(path, size, scheme, hash)

    return open_page


def leave_picture(page, name, **options):
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/trace-{name}.png", **options)


def is_sound(page):
    assert not page.errors, page.errors
    assert [each for each in page.requests if not each.startswith(("file:", "data:"))] == []
    wide = """[...document.querySelectorAll("body *")].filter((each) => !each.closest(".wide")
        && each.getBoundingClientRect().right > innerWidth + 0.5).map((each) => `${each.tagName} ${each.className}`)"""
    assert page.evaluate(wide) == [] and page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    return True


def lit(page):
    return page.evaluate("[...document.querySelectorAll('.lit[id]')].map((each) => each.id).sort()")


@pytest.mark.parametrize("size, scheme", [("desktop", "light"), ("phone", "dark")])
@pytest.mark.parametrize("widths", [(16,), (32, 4)], ids=str)
def test_a_trace(opened, widths, size, scheme):
    made = outcome(widths)
    page = opened(dataclasses.replace(made, correct=True), size, scheme, matching="math")
    assert page.locator("article.card").count() == sum(widths) + 1 == page.locator("button.row").count()
    assert page.locator("section[id^=round]").count() == len(widths) + 1
    assert page.inner_text("#top .pill") == "right"
    assert f"{made.totals.output_tokens:,}" in page.inner_text("#top")
    assert "there are 5 + 12 + 1 = 18 of them" in page.inner_text("#answer")
    assert page.evaluate("[...document.images].every((each) => each.complete && each.naturalWidth > 0)")
    assert "1 cancelled" in page.inner_text("#round0 .warning")
    leave_picture(page, f"{size}-{scheme}-{sum(widths)}", full_page=True)
    # Bars lie where and when their calls did.
    boxes = page.evaluate("""[...document.querySelectorAll("button.row")].map((row) => {
        const boxOf = (part) => row.querySelector(part).getBoundingClientRect();
        const [track, bar] = [boxOf(".track"), boxOf(".bar:not(.attempt)")];
        const attempts = row.querySelectorAll(".attempt").length;
        return [(bar.left - track.left) / track.width, bar.width / track.width, attempts];
    })""")
    calls = [each for round_ in made.rounds for each in round_.trajectories]
    times = [(each.rollout.start, each.rollout.seconds) for each in calls]
    end = max(made.seconds, *map(sum, times))
    for (left, width, attempts), call, (start, seconds) in zip(boxes, calls, times, strict=True):
        assert left == pytest.approx(start / end, abs=0.01)
        assert width == pytest.approx(seconds / end, abs=0.02), "the shortest is a few pixels wide"
        assert attempts == len(call.attempts) - (call.status == "error")
    assert is_sound(page)


def test_citations_are_followed(opened):
    made = outcome((16, 4))
    page = opened(made)
    [label, *_] = trace_data(made)["rounds"][1]["trajectories"][0]["citations"]
    source = made.rounds[1].references[int(label) - 1].index
    page.click(f"#t1-0 .cites .cite >> text=/^{label}( |$)/")
    assert lit(page) == sorted([f"bar-t0-{source}", f"r1-{source}", f"t0-{source}"])
    assert f"Reference {label} of round 2 is trajectory 1.{source + 1}" in page.inner_text("#lit")
    assert page.locator("#t1-0 .text .cite.lit").count() and page.locator("tr.reference.lit td.lit").count()
    page.click("#lit >> text=Show trajectory")
    assert page.evaluate("document.activeElement.id") == f"t0-{source}"
    assert page.evaluate(
        f"(r => r.top >= 0 && r.top < innerHeight)(document.getElementById('t0-{source}').getBoundingClientRect())"
    )
    leave_picture(page, "lit")
    page.keyboard.press("Escape")
    assert page.locator(".lit").count() == 0 and page.is_hidden("#lit")
    page.click("#answer .cite >> nth=0")
    assert lit(page) and "of final synthesis is trajectory 2." in page.inner_text("#lit")
    page.click("#lit >> text=Close")
    page.click("#round1 tr.reference .cite >> nth=2")
    assert f"r1-{made.rounds[1].references[2].index}" in lit(page)
    assert page.inner_text("#round1 .dropped .pill") == "left out: did not fit the prompt"
    rows = page.evaluate(
        "[...document.querySelectorAll('#round1 tr.reference')]"
        ".map((row) => [...row.cells].slice(1).map((cell) => +cell.textContent || 0))"
    )
    trajectories = trace_data(made)["rounds"][1]["trajectories"]
    for label, row in enumerate(rows, start=1):
        assert row == [each["citations"].get(str(label), [0])[0] for each in trajectories]
    assert is_sound(page)


def test_the_timeline_by_keyboard(opened):
    page = opened(outcome((16,)), matching="math")
    page.focus("button.row >> nth=0")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.id") == "bar-t0-1"
    said = page.get_attribute("#bar-t0-1", "aria-label")
    assert said in page.evaluate("getComputedStyle(document.activeElement, '::after').content"), "shown as well"
    assert "1.2: answered" in said and "2 failed attempts before" in said and "tokens/s" in said and "stop" in said
    assert page.locator("button.row[tabindex='0']").count() == 1, "one stop for the Tab key, not one a call"
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "t1-0"
    page.hover("#bar-t0-2")
    assert "1.3: error" in page.evaluate("getComputedStyle(document.getElementById('bar-t0-2'), '::after').content")
    unnamed = page.evaluate("""[...document.querySelectorAll("button, a")].filter(
        (e) => !e.getAttribute("aria-label") && !e.textContent.trim()).length""")
    assert unnamed == 0 and is_sound(page)


def test_reasoning_unfolds(opened):
    page = opened(outcome((16,)), "phone")
    assert not page.locator("#t0-0 .reasoning .text").count(), "laid out when it is opened"
    page.click("#t0-0 .reasoning summary")
    page.wait_for_selector("#t0-0 .reasoning .text")
    assert "The legs seem to be 5 and 12" in page.inner_text("#t0-0 .reasoning .text")
    page.click("#t0-2 summary >> text=1 failed attempt")
    assert "status 400: no such model" in page.inner_text("#t0-2 .more li")
    page.click("#t0-0 summary >> text=Details")
    assert str(outcome((16,)).rounds[0].trajectories[0].rollout.seed) in page.inner_text("#t0-0 .more >> nth=-1")
    assert is_sound(page)


def test_hostile_texts_are_text(opened):
    page = opened(hostile(), "phone", title=HOSTILE)
    for summary in page.locator("summary").all():
        if summary.is_visible() and summary.evaluate("(e) => !e.parentElement.open"):
            summary.click()
    assert page.title() == HOSTILE and page.locator("script").count() == 2 and page.locator("main img").count() == 0
    assert HOSTILE in page.inner_text("#answer") and HOSTILE in page.inner_text("#problem")
    leave_picture(page, "hostile", full_page=True)
    assert is_sound(page)


def test_a_failure_and_references_of_each_call(opened):
    made = outcome((16,))
    page = opened(Outcome(problem=problem(), rounds=made.rounds[:1], error=f"nothing came of it: {HOSTILE}"), "phone")
    assert page.inner_text("#top .pill") == "failed" and HOSTILE in page.inner_text("#answer .error")
    assert page.locator("article.card").count() == 16 and is_sound(page)
    page = opened(Outcome(problem=problem(), error="the problem is too long"))
    assert page.locator("section").count() == 2 and is_sound(page)

    _, rsa = aggregated()
    page = opened(rsa, matching="math")
    source = trace_data(rsa)["rounds"][1]["trajectories"][2]["references"][0]
    page.click("#t1-2 .text .cite")
    assert lit(page) == sorted([f"bar-t0-{source}", f"r1-{source}", f"t0-{source}"])
    assert page.locator("#round1 td.some").count() == 4
    leave_picture(page, "rsa", full_page=True)
    assert is_sound(page)


def test_long_messages_and_addresses(opened):
    made = outcome((2, 2), troubled=False)
    long = changed(made.rounds[1].trajectories[0], content="a line\n" * 200)
    second = dataclasses.replace(made.rounds[1], trajectories=(long, made.rounds[1].trajectories[1]))
    rounds = (made.rounds[0], second, made.rounds[2])
    page = opened(dataclasses.replace(made, rounds=rounds), scheme="dark", hash="#round2")
    assert page.evaluate("scrollY") > 0
    height = "document.querySelector('#t1-0 > .text').clientHeight"
    assert page.evaluate(height) < 400
    page.click("text=Show full messages")
    assert page.evaluate(height) > 2000
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.scrolling')).maxHeight") == "none"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 29, 27)", "paper is white"
    assert is_sound(page)


def test_the_table_of_a_run(opened_file, tmp_path):
    def answered(name, text, **fields):
        made = answering(outcome((16,)), content=text)
        fields = {"ground_truth": None, **fields}
        asked = problem(id=name, ground_truth=fields.pop("ground_truth"))
        return dataclasses.replace(made, problem=asked, **fields)

    outcomes = [
        answered("a", f"so\n\\boxed{{18}}, {HOSTILE}", correct=True, ground_truth="18"),
        answered(HOSTILE, HOSTILE * 3, sample=1),
        dataclasses.replace(Outcome(problem=problem(id="c"), error=HOSTILE), correct=False),
    ]
    entries = [table_entry(each, f"{i}.html", "math") for i, each in enumerate(outcomes)]
    path = tmp_path / "index.html"
    write_table(entries, path, title=HOSTILE, method="PaCoRe [16]")
    page = opened_file(path, "phone")
    assert page.inner_text("h1") == HOSTILE and "34" in page.inner_text("dl") and "1 of 2" in page.inner_text("dl")
    rows = [[cell.strip() for cell in row.inner_text().split("\t")] for row in page.locator("tbody tr").all()]
    names = [["a", "right"], [f"{HOSTILE}, sample 1", "not judged"], ["c", "failed"]]
    assert [row[:2] for row in rows] == names and rows[2][2].startswith("</script>")
    assert rows[0][2:] == ["18", "18", "synthesis", "17", "619k", "13 min 35 s"]
    links = [link.get_attribute("href") for link in page.locator("tbody a").all()]
    assert links == ["0.html", "1.html", "2.html"]
    leave_picture(page, "table")
    assert is_sound(page)
