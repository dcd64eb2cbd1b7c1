"""The page in a real browser."""

import contextlib
import io
import itertools
import os

import pytest
from fake_engine import FakeEngine
from PIL import Image, ImageDraw
from running_server import running, running_app

from stepjax.config import ImageConfig, TokenizerConfig
from stepjax.pacore.config import PacoreConfig
from stepjax.processing.processor import Processor
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
from stepjax.serving.app import make_upstream_app
from stepjax.serving.settings import ServerSettings

SIZES = {"desktop": (1440, 900), "phone": (360, 780)}
PICTURES = os.environ.get("STEPJAX_PAGE_PICTURES")  # a folder to leave screenshots in

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


def script(prompt, params, sample):
    thought = "The picture shows three coloured shapes. I count them from the left: a square, a circle and a bar.\n" * 3
    answer = f"There are 3 shapes:\n\n  1. a square\n  2. a circle\n  3. a bar\n\n{HOSTILE}"
    return [
        *(f"{word} " for word in thought.split(" ")),
        "</think>",
        "\n\n",
        *(f"{word} " for word in answer.split(" ")),
    ]


def drawing(width=1280, height=720):
    image = Image.new("RGB", (width, height), "#f4ead5")
    draw = ImageDraw.Draw(image)
    draw.rectangle((80, 160, 380, 460), fill="#c2452d")
    draw.ellipse((480, 200, 820, 540), fill="#2d6cc2")
    draw.rectangle((950, 80, 1050, 640), fill="#3b8f4d")
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"name": "shapes.png", "mimeType": "image/png", "buffer": file.getvalue()}


@pytest.fixture(scope="module")
def large_views():
    return Processor.from_config(ImageConfig(), TokenizerConfig())


@pytest.fixture
def opened(browser, large_views):
    """A function that opens the page of a server."""
    made = []

    def open_page(engine, size="desktop", scheme="light", **settings):
        server = running(large_views, engine, **{"model_name": "Step3-VL-10B", **settings})
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        one = server.__enter__()
        made.append((server, page))
        page.errors = []
        page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(one.url)
        return one, page

    yield open_page
    for server, page in made:
        page.close()
        server.__exit__(None, None, None)


def leave_picture(page, name):
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png")


def until(page, condition):
    # Playwright's own waiting evaluates text in the page, which the page's policy forbids.
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(condition)


def fits(page):
    return page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.body.scrollHeight <= innerHeight"
    )


@pytest.mark.parametrize("size, scheme", [("desktop", "light"), ("phone", "dark")])
def test_a_conversation(opened, size, scheme):
    server, page = opened(FakeEngine(script, step_seconds=0.01), size, scheme)
    until(page, "document.title === 'Step3-VL-10B'")
    leave_picture(page, f"{size}-{scheme}-0-empty")
    page.set_input_files("#file", drawing())
    page.wait_for_selector("#images .views .grid img >> nth=5")
    assert "3 \u00d7 2 crops and the whole image, 670 tokens" in page.inner_text("#images summary")
    assert fits(page)
    leave_picture(page, f"{size}-{scheme}-1-views")
    page.fill("#text", "How many shapes are there?")
    page.press("#text", "Enter") if size == "desktop" else page.click("#send")
    page.wait_for_selector(".reasoning[open]")
    leave_picture(page, f"{size}-{scheme}-2-thinking")
    page.wait_for_selector(".answer[aria-busy=false]")
    assert "tokens/s" in page.inner_text("#status")
    text = page.inner_text(".answer > .text")
    assert "There are 3 shapes:\n\n  1. a square" in text and HOSTILE in text
    assert page.title() == "Step3-VL-10B"
    assert not page.locator(".reasoning[open]").count() and "Reasoned for" in page.inner_text(".reasoning summary")
    page.click(".reasoning summary")
    assert "I count them" in page.inner_text(".reasoning .text")
    assert fits(page)
    leave_picture(page, f"{size}-{scheme}-3-answer")
    prompt, _ = server.engine.served[-1]
    assert len(prompt.global_views) == 1 and len(prompt.crops) == 6

    page.click("#settings-toggle")
    page.fill("#max-tokens", "40")
    page.fill("#samples", "2")
    page.select_option("#thinking", "on")
    page.fill("#text", "And the colours?")
    page.click("#send")
    until(page, "document.querySelectorAll('.answer[aria-busy=false]').length === 3")
    leave_picture(page, f"{size}-{scheme}-4-settings")
    prompt, params = server.engine.served[-1]
    assert params.n == 2 and params.max_tokens == 40
    assert "There are 3 shapes" in server.context.processor.decode(prompt.tokens)
    assert fits(page) and not page.errors, page.errors


def test_stop_frees_the_request(opened):
    server, page = opened(FakeEngine(lambda *_: ["</think>", *["on and "] * 5000], step_seconds=0.01), "phone")
    page.fill("#text", "go on")
    page.click("#send")
    until(page, "document.querySelector('.answer .text').textContent.length > 100")
    page.click("#stop")
    page.wait_for_selector("text=stopped")
    server.wait_until(lambda: not server.engine.requests)
    assert page.is_visible("#send") and not page.is_visible("#stop")
    page.click("#new")
    assert page.is_visible("#empty") and not page.locator(".answer").count()


def test_errors_and_keys_are_asked_for(opened):
    server, page = opened(FakeEngine(script, step_seconds=0.001), api_keys=("open sesame",))
    page.wait_for_selector("#key-field:visible")
    assert "API key" in page.inner_text("#status")
    page.fill("#text", "hello?")
    page.click("#send")
    page.wait_for_selector(".error")
    assert page.input_value("#text") == "hello?"
    leave_picture(page, "desktop-key")
    page.fill("#key", "open sesame")
    page.press("#key", "Tab")
    until(page, "document.title === 'Step3-VL-10B'")
    page.click("#send")
    page.wait_for_selector(".answer[aria-busy=false]")
    page.set_input_files("#file", {"name": "broken.png", "mimeType": "image/png", "buffer": b"hello"})
    page.wait_for_selector("text=broken.png: image")
    assert not page.locator("#images li").count()
    server.engine.fail(RuntimeError("no"))
    page.fill("#text", "again")
    page.click("#send")
    page.wait_for_selector(".error >> nth=2")


def test_dropped_images_and_keyboard(opened):
    server, page = opened(FakeEngine(script, step_seconds=0.001))
    page.evaluate("""async () => {
        const canvas = new OffscreenCanvas(300, 200), data = new DataTransfer();
        canvas.getContext("2d").fillRect(0, 0, 50, 50);
        data.items.add(new File([await canvas.convertToBlob()], "drop.png", {type: "image/png"}));
        dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}));
    }""")
    page.wait_for_selector("#images .views")
    page.click("text=Remove")
    assert not page.locator("#images li").count()
    assert page.evaluate("document.activeElement.id") == "text"
    names = []
    for _ in range(5):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
    assert "send" in names
    unnamed = page.evaluate("""[...document.querySelectorAll("input, textarea, select, button")].filter(
        (e) => !e.labels?.length && !e.getAttribute("aria-label") && !e.textContent.trim()).length""")
    assert unnamed == 0


def trajectories():
    """Eight that end one after the other, two of them without an answer; then one that cites three of them."""
    numbers = itertools.count()

    def script(prompt, params, sample):
        number = next(numbers)
        if number in (1, 6):
            return ["hm, "] * (15 + number)  # and nothing else
        if number < 8:
            return [*["so "] * (12 + 3 * number), "</think>\n\n", f"The answer is {number + 40}, I think.\n", HOSTILE]
        thought = "Reference 2 and Reference 5 agree, Reference 1 has slipped. Let me check Reference 5 again.\n"
        answer = f"Following Reference 5, the answer is 42.\n\n{HOSTILE}"
        return [*(f"{word} " for word in thought.split(" ")), "</think>\n\n", *(f"{w} " for w in answer.split(" "))]

    return script


@pytest.mark.parametrize("size, scheme", [("desktop", "light"), ("phone", "dark")])
def test_rounds_of_pacore(opened, size, scheme):
    server, page = opened(FakeEngine(trajectories(), step_seconds=0.07), size, scheme)
    until(page, "document.title === 'Step3-VL-10B'")
    page.click("#settings-toggle")
    page.fill("#pacore", "many")
    assert page.is_disabled("#samples")
    page.fill("#text", "What is 6 x 7?")
    page.click("#send")
    assert not page.locator(".answer").count(), "a schedule must be numbers"
    page.fill("#pacore", "8")
    leave_picture(page, f"{size}-{scheme}-pacore-0-settings")
    page.click("#settings-toggle")
    page.click("#send")
    page.wait_for_selector(".bar.running >> nth=3")
    leave_picture(page, f"{size}-{scheme}-pacore-1-running")
    page.wait_for_selector(".bar.ok")
    page.wait_for_selector(".row.lost")
    page.click(".row:has(.bar.ok) >> nth=0")
    assert HOSTILE in page.inner_text(".reading .text")
    page.click(".reading .reasoning summary")
    assert "so so so" in page.inner_text(".reading .reasoning .text")
    page.wait_for_selector(".reasoning[open]")
    leave_picture(page, f"{size}-{scheme}-pacore-2-synthesis")
    page.wait_for_selector(".answer[aria-busy=false]")
    assert page.title() == "Step3-VL-10B"
    assert page.inner_text(".answer > .text").startswith("Following Reference 5, the answer is 42.")
    assert page.locator(".pill.cited").count() == 3 and page.locator("button.row").count() == 9
    assert page.inner_text(".row .pill.chosen") == "the answer"
    heads = page.locator(".group h3").all_inner_texts()
    assert "6 of 8 answered" in heads[0] and "2 lost" in heads[0] and "cites references 1, 2, 5" in heads[1]
    assert fits(page) and not page.errors, page.errors
    leave_picture(page, f"{size}-{scheme}-pacore-3-answer")

    # By keyboard: one stop of Tab for the chart, arrows within it, Enter to read.
    page.click("button.row >> nth=0")
    page.keyboard.press("End")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.inner_text(".reading h4") == "1.8"
    assert page.get_attribute("button.row >> nth=7", "aria-expanded") == "true"
    assert page.locator("button.row[tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    assert not page.locator(".reading").count()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.click(".reading .cites .cite >> nth=0")
    assert page.inner_text(".reading .cites") == "is\nReference 1\nin the next round", (
        "a citation leads to its trajectory"
    )


def ended(round_, index, **fields):
    """What the server says of a trajectory; see docs/serving.md."""
    told = {"type": "trajectory_ended", "round": round_, "index": index, "status": "ok", "loss": None, "error": None}
    told |= {"finish_reason": "stop", "seed": 7, "retries": 0, "prompt_tokens": 9, "cached_tokens": 4, "cites": {}}
    told |= {"output_tokens": 30, "start": 0.5, "seconds": 1.5, "content": "so 42", "message": "so 42"}
    return {**told, "reasoning_content": "hm", "tool_calls": [], **fields}


def test_events_build_up_the_rounds(opened):
    """Attempts, ends of reasoning, shortened references and a fallback, which the fake engine does not bring about."""
    _, page = opened(FakeEngine(script), "phone")
    page.evaluate("""async () => {
        const { LiveRounds } = await import("./live.js");
        globalThis.live = new LiveRounds();
        document.getElementById("chat").append(live.element);
    }""")

    def take(*events):
        page.evaluate("(events) => events.forEach((event) => live.take(event))", list(events))
        return [row.get_attribute("aria-label") for row in page.locator("button.row").all()]

    started = {"type": "round_started", "is_final": False, "width": 4, "references": [], "seconds": 0.1}
    rows = take({**started, "round": 0}, {"type": "progress", "round": 0, "tokens": {"0": 40, "1": 1, "2": 0}})
    assert rows[0] == "1.1: writing \u00b7 40 tokens \u00b7 from 0.1 s" and rows[1].startswith(
        "1.2: writing \u00b7 1 token "
    )
    assert rows[2].startswith("1.3: waiting")
    failed = {"type": "attempt_failed", "index": 1, "status": "timeout", "error": HOSTILE, "output_tokens": 12}
    rows = take({**failed, "round": 0, "is_final": False, "seconds": 0.05})
    assert rows[1].startswith("1.2: waiting \u00b7 0 tokens \u00b7 1 failed attempt before \u00b7 from ")
    assert page.locator(".bar.attempt").count() == 1
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    rows = take(
        ended(0, 0, finish_reason="length", content="", message="[...] so", reasoning_content="and so"),
        ended(0, 1, content="<think>a</think>b", reasoning_content=None, tool_calls=[call]),
        ended(0, 2, loss="truncated", finish_reason="length", content="", message=None),
        ended(0, 3, status="error", loss="error", finish_reason=None, error="no", content="", message=None),
        {
            **started,
            "round": 1,
            "width": 2,
            "references": [{"index": 1, "was_cut": True}, {"index": 0, "was_cut": True}],
        },
        ended(1, 0, cites={"1": 3}, finish_reason="length"),
    )
    assert rows[0].startswith("1.1: end of its reasoning only \u00b7 30 tokens \u00b7 1.5 s \u00b7 20 tokens/s")
    assert rows[0].endswith("Reference 2 of the next round")
    assert rows[1].endswith("from 0.5 s \u00b7 Reference 1 of the next round, shortened, cited 3 times")
    assert "cut off in its reasoning" in rows[2] and "error" in rows[3] and "answer cut off" in rows[4]
    assert page.inner_text(".group h3 >> nth=0").startswith("Round 1 2 of 4 answered \u00b7 2 lost \u00b7 120 tokens")
    page.click("button.row >> nth=1")
    card = page.inner_text(".reading .card")
    assert (
        "calls look" in card
        and '{"at": 1}' in card
        and "Reasoning, 1 character\n" in card
        and "1 failed attempt" in card
    )
    page.click(".reading >> text=1 failed attempt")
    assert f"timed out after 0.1 s, 12 tokens lost: {HOSTILE}" in page.inner_text(".reading li")
    page.click(".reading .cite")
    page.click("button.row >> nth=4")
    page.click(".reading .cites .cite")
    assert page.evaluate("document.activeElement.id").endswith("bar-t0-1"), "a citation leads to its trajectory"
    take({"type": "done", "answered_by": "fallback", "chosen": [1, 0], "seconds": 9.0})
    assert page.inner_text("button.row:has(.pill.chosen) .name") == "2.1"
    assert "Answered by fallback" in page.inner_text(".rounds > p")
    page.evaluate("live.stop()")
    assert page.get_attribute("button.row >> nth=5", "aria-label").startswith("2.2: stopped")
    assert fits(page) and not page.errors, page.errors


def test_stopping_and_failing_rounds(opened):
    server, page = opened(FakeEngine(lambda *_: ["</think>", *["on and "] * 5000], step_seconds=0.01))
    page.click("#settings-toggle")
    page.fill("#pacore", "low")
    page.fill("#text", "go on")
    page.click("#send")
    page.wait_for_selector(".bar.running")
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    server.wait_until(lambda: not server.engine.requests)
    assert page.locator(".row.lost").count() == 4 and "stopped" in page.inner_text("button.row >> nth=0")
    server.engine.script = lambda *_: ["nothing but thought"]
    page.fill("#text", "again")
    page.click("#send")
    page.wait_for_selector(".error")
    assert "round 1 of 4 left no message (4 empty)" in page.inner_text(".error")
    assert page.input_value("#text") == "again" and page.locator(".row.lost").count() == 8


def test_the_page_in_front_of_another_server(browser, large_views):
    """Rounds are what it answers with by itself, and the views of images are not to be had."""
    with contextlib.ExitStack() as stack:
        behind = stack.enter_context(running(large_views, FakeEngine(lambda *_: ["</think>\n\n", "fine"])))

        async def make(_):
            sampler = EndpointSampler(EndpointConfig(url=f"{behind.url}/v1"))
            return None, make_upstream_app(sampler, ServerSettings(), PacoreConfig(schedule=(3, 2)))

        front = stack.enter_context(running_app(make))
        page = browser.new_page()
        stack.callback(page.close)
        page.goto(front.url)
        until(page, "document.title === 'tiny'")
        assert page.input_value("#pacore") == "3, 2"
        page.set_input_files("#file", drawing())
        page.wait_for_selector("#images >> text=shapes.png")
        page.fill("#text", "What is it?")
        page.click("#send")
        page.wait_for_selector(".answer[aria-busy=false]")
        assert page.locator(".bar.ok").count() == 6 and page.inner_text(".answer > .text") == "fine"
        assert [len(prompt.global_views) for prompt, _ in behind.engine.served] == [1] * 6
        page.click("#settings-toggle")
        page.fill("#pacore", "")
        page.fill("#text", "And now?")
        page.click("#send")
        until(page, "document.querySelectorAll('.answer[aria-busy=false]').length === 2")
        assert len(behind.engine.served) == 7
