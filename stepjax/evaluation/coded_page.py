"""A page on which a person moves lambda and sees what a device sends of an image, and what the model answers.

Legend: M views, S side of a view, N features of a view, K clusters, C channels.

A stop of the page's slider is a run, those with the fewest bits first; the last may be a model that sees the image
itself. All is computed beforehand, with the device and the codec of each run. The data of web/tofc.js:

    title
    stops[]          name; rate_weight, codec, experts, channels: null where images are not coded
    pictures[]       name, width, height, image (a data URI), sizes: [[codec, bytes], ...]
      questions[]    text, truth or null
      shown[]        of each stop: bytes; views, null where the image is not coded; answers: text,
                     thought (reasoning) or null, right or null, cut
        views[]      crops row by row, then the global view: box (x, y, width, height in pixels of the image), side of
                     the grid of features; clusters, the cluster of every feature; and of each cluster centres (the
                     index of a feature, or null), experts and bits
"""

import base64
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, features

from stepjax import web
from stepjax.config import EvaluationConfig, RunConfig
from stepjax.data.records import open_source
from stepjax.errors import CheckpointError, ConfigError
from stepjax.evaluation.evaluate import evaluation_engine, rollouts_of
from stepjax.inference.request import SamplingParams
from stepjax.interop.codec_files import load_codec
from stepjax.interop.load import load_model, load_processor
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.models.step_vl import StepVL, abstract_model
from stepjax.processing.image_files import open_image
from stepjax.processing.images import CodedImage, ViewPlan, make_views
from stepjax.processing.processor import Processor
from stepjax.progress import Progress, progress
from stepjax.rewards.verify import is_right
from stepjax.rollouts.rollout import Rollout
from stepjax.tasks import gold
from stepjax.tofc import codec
from stepjax.tofc.codec import decode_image
from stepjax.tofc.device import Device

_TITLE = "What a device sends"
_MOST_PIXELS = 1600  # of the longer side of an image on the page
_BATCH = 8  # questions answered at a time
_NAMES = {"webp": "WebP", "avif": "AVIF"}  # of codecs that Pillow may lack
_ANSWER = {"role": "assistant"}  # yet to come
_AGREES = 0.1  # how far means may be from the device's, in standard deviations of the channels


class Picture(NamedTuple):
    """An image, and the questions about it: records whose image it is, with what is right where that is known."""

    name: str
    image: Image.Image
    records: tuple[dict[str, Any], ...]
    has_truth: bool


def pictures_of(images: Sequence[str], prompts: Sequence[str], *, prompt_first: bool = False) -> list[Picture]:
    """
    Args:
        prompt_first: whether a question comes before the image.

    Raises:
        ImageError: an image cannot be read.
    """
    pictures = []
    for path in images:
        image = open_image(path, name=path)
        part = {"type": "image", "image": image}
        contents = [[part, {"type": "text", "text": prompt}][:: -1 if prompt_first else 1] for prompt in prompts]
        records = tuple({"id": path, "messages": [{"role": "user", "content": each}, _ANSWER]} for each in contents)
        pictures.append(Picture(Path(path).name, image, records, has_truth=False))
    return pictures


def held_out(config: RunConfig, count: int) -> list[Picture]:
    """The run's first questions about one image, its evaluation's sources in turns.

    Raises:
        ConfigError: there are none.
        RecordError: a record is malformed.
    """
    sources = [open_source(source, config.seed) for source in config.evaluation.sources]
    longest = min(max(map(len, sources), default=0), config.evaluation.examples)
    pictures = []
    for record in (source[i] for i in range(longest) for source in sources if i < len(source)):
        items = [item for item in _items(record) if item.get("type") == "image"]
        if len(pictures) == count:
            break
        if gold.is_question(record) and len(items) == 1:
            image = open_image(items[0]["image"], name=record["id"], frame=items[0].get("frame"))
            items[0] |= {"image": image, "frame": None}
            pictures.append(Picture(record["id"], image, (record,), has_truth=True))
    if not pictures:
        raise ConfigError(f"{config.name}: evaluation.sources ask nothing about an image; give --image and --prompt")
    return pictures


def write_page(
    path: Path,
    runs: Sequence[str],
    pictures: Callable[[RunConfig], list[Picture]],
    *,
    base: str | None = None,
    quality: int = 50,
    max_tokens: int = 128,
) -> dict[str, Any]:
    """Writes the page and returns its data.

    Args:
        runs: with a codec each.
        pictures: gives the pictures, of the configuration of the run of the largest lambda.
        base: a run without a codec, which sees the images themselves.
        quality: of the image codecs that the frames are compared with.
        max_tokens: of an answer.

    Raises:
        CheckpointError: a run cannot be used, or its device computes other features than its model.
        ConfigError: the runs' views differ, or `base` has a codec.
        ImageError, RecordError: an image or a record cannot be used.
        BitstreamError: a feature cannot be coded.
    """
    stops = sorted(map(_coded, runs), key=lambda stop: -stop.about["rate_weight"])
    stops += [] if base is None else [_plain(base)]
    images = stops[0].config.images
    for other in stops[1:]:
        for name, value in dataclasses.asdict(other.config.images).items():
            if value != getattr(images, name) and name != "most_tokens":  # which may differ: clusters
                had = f"{stops[0].path} has {getattr(images, name)}"
                raise ConfigError(f"{other.path}: images.{name}={value}, but {had}: name runs of one recipe")
    asked = pictures(stops[0].config)
    data = {"title": _TITLE, "stops": [stop.about for stop in stops]}
    described: list[dict[str, Any]] = [_described(picture, quality) for picture in asked]
    total = len(stops) * sum(1 + len(picture.records) for picture in asked)
    with progress(total, unit=" images and answers", description="computing") as bar:
        for stop in stops:
            for each, shown in zip(described, _shown(stop, asked, max_tokens, bar), strict=True):
                each["shown"].append({"bytes": each["sizes"][0][1]} | shown)
    data["pictures"] = described
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(web.saved_page(_TITLE, data, kind="tofc"), encoding="utf-8")
    temporary.replace(path)
    return data


class _Stop(NamedTuple):
    path: str
    source: OrbaxDirectory
    config: RunConfig
    about: dict[str, Any]  # for the page


def _coded(path: str) -> _Stop:
    source = OrbaxDirectory(path)
    tables, config = load_codec(source), source.run
    assert config is not None and config.model.tofc is not None
    about = {"name": config.name, "rate_weight": config.model.tofc.rate_weight, "codec": tables.id}
    return _Stop(path, source, config, about | {"experts": tables.num_experts, "channels": tables.channels})


def _plain(path: str) -> _Stop:
    source = OrbaxDirectory(path)
    if source.run is None or source.run.model.tofc is not None:
        raise ConfigError(f"--base {path}: must be a run without a codec, which sees the images themselves")
    about = {"name": source.run.name} | dict.fromkeys(("rate_weight", "codec", "experts", "channels"))
    return _Stop(path, source, source.run, about)


def _shown(stop: _Stop, pictures: Sequence[Picture], max_tokens: int, bar: Progress) -> Iterator[dict[str, Any]]:
    """What a stop shows of each picture. Its model is in memory only here."""
    model, processor = load_model(stop.source), load_processor(stop.source)
    assert isinstance(model, StepVL) and isinstance(processor, Processor)
    sent: list[dict[str, Any]] = [{"views": None} for _ in pictures]
    coded: dict[int, CodedImage] = {}
    if model.tofc is not None:
        device = Device(stop.path)
        for picture, each in zip(pictures, sent, strict=True):
            frame, tiles, _, _ = device.encode(picture.image)
            coded[id(picture.image)] = decode_image(device.tables, frame, processor.image_config)
            each |= {"bytes": len(frame), "views": views_of(model, device, picture.image, tiles)}
            bar.update()

    def opened(image: Image.Image, **_: Any) -> Image.Image | CodedImage:
        bar.update()  # once a question
        return coded.get(id(image), image)

    engine = evaluation_engine(model, processor, EvaluationConfig(batch_size=_BATCH, max_new_tokens=max_tokens))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    records = [record for picture in pictures for record in picture.records]
    rollouts = iter(rollouts_of(engine, processor, records, params, opened))
    for picture, each in zip(pictures, sent, strict=True):
        each["answers"] = [_answer(record, next(rollouts), picture.has_truth) for record in picture.records]
        yield each


def _answer(record: dict[str, Any], rollout: Rollout, has_truth: bool) -> dict[str, Any]:
    right = is_right(record, rollout.content) if has_truth else None
    is_cut = rollout.finish_reason == "length"
    return {"text": rollout.content, "thought": rollout.reasoning or None, "right": right, "cut": is_cut}


def views_of(model: StepVL, device: Device, image: Image.Image, tiles: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """The clusters of every view, as the page has them.

    Args:
        tiles: of the image, by the device.

    Raises:
        CheckpointError: the model's clusters have other means.
    """
    views = make_views(image, device.images)
    numerics = dataclasses.replace(model.numerics, attention="xla", remat="none", encoder_remat=None)  # the device's
    structure = jax.tree.structure(abstract_model(model.config, numerics))
    same = jax.tree.unflatten(structure, jax.tree.leaves(model))
    made = [jax.device_get(_clusters(same, view[None])) for view in (*views.crops_NHWC, views.global_view_HWC)]
    found = []
    for x_KC, clusters, box in zip(tiles, made, _boxes(views.plan), strict=True):
        error_KC = (clusters.means_KC[0].astype(np.float32) - x_KC) / device.tables.arrays["spread"]
        if not np.sqrt(np.mean(np.square(error_KC))) < _AGREES:
            raise CheckpointError(
                f"codec {device.tables.id}: the device's features are not those of the run's model; train the run anew"
            )
        experts_K, bits_K = codec.costs(device.tables, x_KC)
        of_features = clusters.assignment_N[0].tolist()
        found.append(
            {
                "box": box,
                "side": round(len(of_features) ** 0.5),
                "clusters": of_features,
                "centres": [
                    None if centre == len(of_features) else centre for centre in clusters.centres_K[0].tolist()
                ],
                "experts": experts_K.tolist(),
                "bits": np.round(bits_K, 1).tolist(),
            }
        )
    return found


@jax.jit
def _clusters(model: StepVL, views_MSSC: jax.Array):
    return model.view_clusters(views_MSSC)


def _boxes(plan: ViewPlan) -> Iterator[list[float]]:
    """Where the crops and the global view lie in the image, in its pixels; they may reach beyond it."""
    (width, height), (across, down) = plan.padded_size, plan.resized_size
    for x0, y0, x1, y1 in plan.boxes:
        yield [x0 * width / across, y0 * height / down, (x1 - x0) * width / across, (y1 - y0) * height / down]
    yield [0, 0, width, height]


def _described(picture: Picture, quality: int) -> dict[str, Any]:
    image, scale = picture.image, min(_MOST_PIXELS / max(picture.image.size), 1)
    small = image if scale == 1 else image.resize([max(round(side * scale), 1) for side in image.size])
    plain = _file(small, "webp", lossless=max(image.size) <= 512, quality=85)
    codecs = [name for name in _NAMES if features.check(name)]
    sizes = [(f"{_NAMES[name]}, quality {quality}", len(_file(image, name, quality=quality))) for name in codecs]
    return {
        "name": picture.name,
        "width": image.width,
        "height": image.height,
        "image": f"data:image/webp;base64,{base64.b64encode(plain).decode()}",
        "sizes": [("PNG", len(_file(image, "png"))), *sizes],
        "questions": [
            {
                "text": "\n".join(item["text"] for item in _items(record) if item.get("type") == "text"),
                "truth": gold.shown(record) if picture.has_truth else None,
            }
            for record in picture.records
        ],
        "shown": [],
    }


def _items(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The items of all messages but the last, which has the answer."""
    contents = [message.get("content") for message in (record.get("messages") or ())[:-1]]
    listed = [each if isinstance(each, list) else [{"type": "text", "text": str(each or "")}] for each in contents]
    return [item for content in listed for item in content]


def _file(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
