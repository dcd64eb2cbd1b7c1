"""The page of what devices send: its data beside device, codec and engine, that nothing gets out of it, and a browser.

Legend: M views, N features of a view, Z channels of a coded feature.
"""

import dataclasses
import json
import os
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from stepjax.cli import main
from stepjax.config import DigitsSource, EvaluationConfig
from stepjax.config_file import to_json
from stepjax.errors import CheckpointError, ConfigError
from stepjax.evaluation.coded_page import held_out, views_of
from stepjax.interop.codec_files import write_codec
from stepjax.interop.load import load_run
from stepjax.processing.image_files import open_image
from stepjax.processing.images import make_views
from stepjax.rewards.verify import is_right
from stepjax.tofc import codec
from stepjax.tofc.device import Device
from stepjax.training.checkpoint import Checkpointer
from stepjax.training.step import new_state
from stepjax.web import saved_page

pytest_plugins = ("tiny_run",)

PICTURES = os.environ.get("STEPJAX_PAGE_PICTURES")  # a folder to leave screenshots in
HOSTILE = "</script><img src=x onerror=alert(1)> \u2028 & <b>What?"
NAME = "<i>&amp;.png"
SOURCES = tuple(
    DigitsSource(name=task, weight=1.0, task=task, split="held_out") for task in ("arithmetic", "count", "add")
)


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """Runs of lambda 0.1 and 0.4 and one without a codec, of the tiny run's parameters; the second has wider steps."""
    out = tmp_path_factory.mktemp("rates")
    model, _, config = load_run(run)
    of_run: Any = config.model.tofc
    made = {}
    for name, rate_weight, wider in (("fine", 0.1, 0.0), ("coarse", 0.4, 1.5), ("plain", None, 0.0)):
        tofc = rate_weight and dataclasses.replace(of_run, rate_weight=rate_weight)
        own = dataclasses.replace(
            config,
            name=name,
            out=str(out),
            model=dataclasses.replace(config.model, tofc=tofc),
            evaluation=EvaluationConfig(sources=SOURCES, examples=3),
        )
        saved: Any = jax.tree.map(lambda leaf: leaf, model)
        if tofc is None:
            saved.tofc = None
        else:
            saved.tofc.hyperprior.experts.log_step[...] += wider
        with Checkpointer(out / name / "checkpoints", keep=1, config=to_json(own)) as saver:
            saver.save(1, new_state(saved, optax.sgd(1.0)), {}, wait=True)
        if tofc is not None:
            write_codec(saved, own)
        made[name] = str(out / name)
    return made


@pytest.fixture(scope="module")
def made(runs, pictures, tmp_path_factory):
    """The page of two pictures, one of a hostile name, and two questions, one hostile."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copy(pictures / "small.png", folder / NAME)
    images = ["--image", str(pictures / "large.png"), str(folder / NAME), "--prompt", "What?", HOSTILE]
    options = ["--base", runs["plain"], "--max-tokens", "6", "--out", str(folder / "deep" / "page.html")]
    assert main(["tofc", "page", runs["fine"], runs["coarse"], *images, *options]) == 0
    return folder / "deep" / "page.html"


def data_of(path):
    [data] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(data)


# What it says --------------------------------------------------------------------------------------------------------


def test_stops_are_sorted_and_frames_are_the_devices(made, runs, pictures):
    data = data_of(made)
    assert [each["name"] for each in data["stops"]] == ["coarse", "fine", "plain"]
    assert [each["rate_weight"] for each in data["stops"]] == [0.4, 0.1, None]
    assert [each["name"] for each in data["pictures"]] == ["large.png", NAME]
    assert data["pictures"][0]["width"], data["pictures"][0]["height"] == (120, 80)
    for picture in data["pictures"]:
        image = open_image(str(pictures / ("large.png" if picture["width"] == 120 else "small.png")))
        for stop, shown, name in zip(data["stops"], picture["shown"], ("coarse", "fine", "plain"), strict=True):
            if name == "plain":
                assert shown["views"] is None and shown["bytes"] == dict(picture["sizes"])["PNG"]
                continue
            device = Device(runs[name])
            frame, tiles, _, _ = device.encode(image)
            assert (stop["codec"], shown["bytes"]) == (device.tables.id, len(frame))
            bits = sum(sum(view["bits"]) for view in shown["views"])
            payload = sum(map(len, codec.parse(frame).payloads))
            assert 0 <= payload - bits / 8 < 12 * len(tiles), "lanes and lengths"
            experts = codec.analyse(device.tables, np.concatenate(tiles))[0]
            assert sum((view["experts"] for view in shown["views"]), []) == experts.tolist()
        coarse, fine, _ = (each["bytes"] for each in picture["shown"])
        assert coarse < fine


def test_clusters_are_those_that_the_device_coded(made, runs, pictures):
    """A tile is the means of the features that the page says."""
    config = load_run(runs["fine"])[2]
    model: Any = load_run(runs["fine"])[0]
    views = make_views(open_image(str(pictures / "large.png")), config.images)
    tiles, _ = Device(runs["fine"]).features(open_image(str(pictures / "large.png")))
    shown = data_of(made)["pictures"][0]["shown"][1]["views"]
    assert len(shown) == 7 and [view["side"] for view in shown] == [2] * 6 + [3]
    for view, tile, pixels in zip(shown, tiles, (*views.crops_NHWC, views.global_view_HWC), strict=True):
        x_NZ = (model.projector.downsampled(model.vision(pixels[None])) @ model.tofc.down)[0]
        clusters = np.array(view["clusters"])
        assert sorted(set(clusters)) == list(range(len(tile))) and clusters[view["centres"]].tolist() == [
            *set(clusters)
        ]
        means = [np.asarray(x_NZ)[clusters == cluster].mean(axis=0) for cluster in range(len(tile))]
        np.testing.assert_allclose(means, tile, rtol=1e-3, atol=1e-3)
    # 120 x 80 pixels are cut as 126 x 84, in windows of 42.
    assert np.allclose(shown[4]["box"], (40, 40, 40, 40)) and shown[6]["box"] == [0, 0, 120, 80]


def test_thin_images_have_their_views_where_they_are(runs):
    """One that is padded to a square, which its views show: they reach beyond it."""
    model, device = load_run(runs["fine"])[0], Device(runs["fine"])
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (20, 100, 3), np.uint8))
    crops = views_of(model, device, image, device.features(image)[0])
    assert crops[-1]["box"] == [0, 0, 100, 100]
    reach = [(box[0] + box[2], box[1] + box[3]) for box in (view["box"] for view in crops[:-1])]
    assert np.allclose(np.max(reach, axis=0), 100)


def test_answers_are_those_of_frames_and_of_the_image(made, runs, pictures, tmp_path, capsys):
    def whole(answer):
        return (answer["thought"] or answer["text"]) + "\n"  # six tokens of reasoning have no answer yet

    shown = data_of(made)["pictures"][0]["shown"]
    ask = ["--prompt", "What?", "--max-tokens", "6"]
    for name, each in zip(("coarse", "fine"), shown, strict=False):
        frame = str(tmp_path / f"{name}.tofc")
        assert main(["tofc", "encode", runs[name], str(pictures / "large.png"), "--out", frame]) == 0
        capsys.readouterr()
        assert main(["tofc", "decode", runs[name], frame, *ask]) == 0
        assert capsys.readouterr().out == whole(each["answers"][0])
    assert main(["generate", runs["plain"], "--image", str(pictures / "large.png"), *ask]) == 0
    assert capsys.readouterr().out == whole(shown[2]["answers"][0])
    assert {answer["right"] for each in shown for answer in each["answers"]} == {None}


def test_without_images_it_is_about_held_out_questions(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    options = ["--examples", "3", "--max-tokens", "4", "--out", str(page)]
    assert main(["tofc", "page", runs["coarse"], *options]) == 0
    assert "3 images at 1 stops" in capsys.readouterr().out
    found, names = data_of(page)["pictures"], ("count/held_out/0", "add/held_out/0", "count/held_out/1")
    assert [each["name"] for each in found] == [f"digits/{name}" for name in names]
    for picture, each in zip(held_out(load_run(runs["coarse"])[2], 3), found, strict=True):
        [answer], [question], [record] = each["shown"][0]["answers"], each["questions"], picture.records
        assert question["truth"] == record["answer"]["text"] and question["text"]
        assert answer["right"] == is_right(record, answer["text"])


# Bad input -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_shown_is_refused(runs, run, pictures, tmp_path, capsys):
    out = ["--out", str(tmp_path / "page.html")]
    ask = ["--image", str(pictures / "small.png"), "--prompt", "What?"]

    def said(*arguments):
        assert main(["tofc", "page", *arguments]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "RUN: name at least one" in said(*out)
    assert "--image and --prompt go together" in said(runs["fine"], "--prompt", "What?", *out)
    assert "quality=0: must be 1 to 100" in said(runs["fine"], *ask, "--quality", "0", *out)
    assert "is a directory" in said(runs["fine"], *ask, "--out", str(tmp_path))
    assert "has no codec: train one" in said(runs["plain"], *ask, *out)
    assert "must be a run without a codec" in said(runs["fine"], "--base", runs["coarse"], *ask, *out)
    assert "nothing.png: no such file" in said(runs["fine"], "--image", "nothing.png", "--prompt", "What?", *out)
    (tmp_path / "broken.png").write_bytes((pictures / "small.png").read_bytes()[:60])
    assert "broken.png: cannot be read" in said(
        runs["fine"], "--image", str(tmp_path / "broken.png"), "--prompt", "What?", *out
    )
    assert "ask nothing about an image" in said(str(run), *out)
    assert not (tmp_path / "page.html").exists()


def test_runs_of_other_views_are_refused(runs, tmp_path, capsys):
    model, _, config = load_run(runs["fine"])
    images = dataclasses.replace(config.images, max_side=84)
    other = dataclasses.replace(config, name="other", out=str(tmp_path), images=images)
    with Checkpointer(tmp_path / "other" / "checkpoints", keep=1, config=to_json(other)) as saver:
        saver.save(1, new_state(model, optax.sgd(1.0)), {}, wait=True)
    write_codec(model, other)
    assert main(["tofc", "page", runs["coarse"], str(tmp_path / "other"), "--out", str(tmp_path / "x.html")]) == 1
    assert "other: images.max_side=84, but" in capsys.readouterr().err


def test_a_device_of_another_model_is_refused(runs, pictures):
    device = Device(runs["fine"])
    model: Any = load_run(runs["fine"])[0]
    image = open_image(str(pictures / "small.png"))
    tiles, _ = device.features(image)
    model.tofc.down[...] = jnp.roll(model.tofc.down[...], 1, axis=0)
    with pytest.raises(CheckpointError, match="the device's features are not those of the run's model"):
        views_of(model, device, image, tiles)


def test_sources_without_images_are_refused(runs):
    config = load_run(runs["fine"])[2]
    config = dataclasses.replace(config, evaluation=EvaluationConfig(sources=SOURCES[:1]))
    with pytest.raises(ConfigError, match="give --image and --prompt"):
        held_out(config, 3)


def test_nothing_gets_out_of_the_page(made):
    text = made.read_text()
    assert text.count("<script") == 2 and "<img" not in text and "<i>" not in text and "<b>" not in text
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text and "unsafe" not in text
    assert data_of(made)["pictures"][0]["questions"][1]["text"] == HOSTILE


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (700, "light"), (360, "dark")])
def test_the_slider_and_the_keys(browser, made, width, scheme):
    data = data_of(made)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url[:20]))
    page.goto(made.as_uri())

    def shows(picture, stop):
        shown = data["pictures"][picture]["shown"][stop]
        pressed = page.locator(".tick-of[aria-pressed=true]")
        assert pressed.count() == 1 and f"{shown['bytes']:,} bytes" in pressed.inner_text()
        assert page.input_value("#rate") == str(stop)
        clusters = sum(len(view["centres"]) for view in shown["views"] or ())
        assert page.locator("path.cluster").count() == page.locator("circle.centre").count() == clusters
        answers = page.evaluate(
            "[...document.querySelectorAll('.answer-of')].map((each) => "
            "[...each.querySelectorAll(':not(del)')].map((part) => part.textContent).join(''))"
        )
        assert answers == [each["text"] or "(no answer)" for each in shown["answers"]]

    shows(0, 0)
    page.keyboard.press("ArrowRight")
    shows(0, 1)
    page.focus("#rate")
    page.keyboard.press("ArrowRight")
    shows(0, 2)
    page.keyboard.press("ArrowRight")
    shows(0, 2)
    page.keyboard.press("ArrowLeft")
    page.click(".thumbnail >> nth=1")
    shows(1, 1)
    assert page.locator("svg").count() == 1, "no crops"
    page.click(".tick-of >> nth=0")
    page.click(".thumbnail >> nth=0")
    shows(0, 0)
    assert page.locator("svg").count() == 2
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/tofc-{width}-{scheme}.png", full_page=True)
    # What a cell says.
    view = data["pictures"][0]["shown"][0]["views"][0]
    page.locator("path.cluster >> nth=0").dispatch_event("pointermove", {"clientX": 50, "clientY": 50})
    said = page.inner_text("#tip").split("\n")
    size = view["clusters"].count(0)
    expert, bits = f"expert {view['experts'][0] + 1}", f"{view['bits'][0]:.1f} bits"
    assert said == ["Cluster 1 of 2", f"{size} of 4 features", expert, bits]
    for shade, count in (("none", 0), ("bits", 16), ("experts", 16)):
        page.select_option("#shade", shade)
        assert page.locator("path.cluster").count() == count
    # The question that would be HTML.
    assert page.locator("h2 img, h2 b, #pictures i").count() == 0
    assert "<img src=x onerror=alert(1)>" in page.inner_text(".question >> nth=1")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert errors == [] and [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_differences_are_marked(browser, made, tmp_path):
    """Of words and digits, against the chosen stop."""
    page = browser.new_page()
    data = data_of(made)
    texts = ["It is 47 cats", "It is 41 old cats", "It is 41 old cats"]
    for shown, text in zip(data["pictures"][0]["shown"], texts, strict=True):
        shown["answers"][0]["text"] = text
    (tmp_path / "page.html").write_text(saved_page("x", data, kind="tofc"))
    page.goto((tmp_path / "page.html").as_uri())
    first = page.locator(".answer-of >> nth=0")
    marked = "[...document.querySelector('.answer-of').children].map((each) => [each.tagName, each.textContent])"
    assert page.input_value("#against") == "base" and first.inner_text() == "It is 41 old7 cats"
    assert page.evaluate(marked) == [
        *(["SPAN", "It is 4"], ["DEL", "1 old"], ["INS", "7"], ["SPAN", " cats"]),
    ]
    page.select_option("#against", "left")
    assert page.evaluate(marked) == [["SPAN", "It is 47 cats"]], "no stop there"
    page.keyboard.press("Escape")
    page.click(".tick-of >> nth=1")
    assert "changed" in page.inner_text(".question .notes >> nth=0")
    page.select_option("#against", "right")
    assert "same" in page.inner_text(".question .notes >> nth=0")
    marks = page.evaluate("[...document.querySelectorAll('.question:nth-of-type(1) .mark')].map((e) => e.textContent)")
    assert marks == ["\u2260", "=", "="]
    page.close()
