"""`stepjax tofc ...`: train a codec, encode images as a device, decode and answer as a server, measure both."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from stepjax.config import SftConfig
from stepjax.errors import ConfigError, require, require_positive
from stepjax.evaluation.command import Eval, show
from stepjax.figures import printable
from stepjax.inference.request import SamplingParams
from stepjax.tofc.client import Policy
from stepjax.training.command import Sft

KEY_VARIABLE = "STEPJAX_API_KEY"

Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofcTrain(Sft):
    """Train a codec for visual features with a model; rerun the same command to resume.

    The recipe is an SftConfig with `model.tofc`. What trains is what `optimizer.freeze` leaves: all of the model, or
    only the codec and the projector. At the end the codec is frozen, and written with the device's program to RUN/tofc.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]  # such as configs/digits/tofc.py
    config: Annotated[SftConfig, tyro.conf.arg(name="")]
    dry_run: bool = False  # print the configuration, parameters, FLOPs and memory; train nothing
    trains_codec: ClassVar[bool] = True

    def run(self) -> int:
        """As `Sft.run`.

        Raises:
            StepjaxError: as there, or the recipe has no codec.
        """
        if self.config.model.tofc is None:
            raise ConfigError(f"model.tofc=None: {self.recipe} has no codec to train; give its model a TofcConfig")
        return super().run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofcEncode:
    """Encode images as a device does: encoder, merging and entropy coder of a run.

    It needs only the run's directory `tofc`, and the packages of `stepjax[device]`. Prints the bytes of each image's
    file and of its frame, and the time after compilation.
    """

    directory: Run  # a run, or a copy of its directory `tofc`
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]  # image files
    out: Path  # file of the frame; of several images, the directory of IMAGE.tofc

    def run(self) -> int:
        """
        Raises:
            StepjaxError: the run or an image cannot be used.
        """
        names = [Path(image).stem for image in self.images]
        if not names or (len(names) > 1 and len(set(names)) < len(names)):
            raise ConfigError(f"IMAGE={' '.join(self.images)}: name at least one, and none twice")
        from stepjax.processing.image_files import open_image
        from stepjax.tofc.device import Device

        device = Device(self.directory)
        print(f"codec {device.tables.id}, encoder of {device.size / 1e6:.1f} MB")
        for path, name in zip(self.images, names, strict=True):
            image = open_image(path, name=path)
            device.features(image)  # compiles, where that is not done yet
            frame, _, encoder, coder = device.encode(image)
            target = self.out if len(names) == 1 else self.out / f"{name}.tofc"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(frame)
            size = Path(path).stat().st_size
            print(
                f"{printable(path)}: {image.width} x {image.height} pixels, {size:,} bytes as a file, {len(frame):,} "
                f"coded in {encoder:.1f} + {coder:.1f} ms (encoder, coder), in {target}"
            )
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofcDecode:
    """Decode images that a device encoded, as a server does, and answer a question about them."""

    directory: Run  # the run whose device encoded them; without --prompt a copy of its directory `tofc` will do
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]  # frames
    prompt: str | None = None  # the question
    prompt_first: bool = False  # before the images, for a model that was trained so
    out: Path | None = None  # write the decoded features to this .npz: tile_0, tile_1, ... of each file, and columns
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = SamplingParams(
        temperature=0.0, max_tokens=128, seed=0
    )

    def run(self) -> int:
        """
        Raises:
            BitstreamError: a file is no frame, is damaged or truncated, or is another codec's: see its subclasses.
            StepjaxError: the run cannot be used, or the prompt does not fit the context.
        """
        import numpy as np

        from stepjax.tofc import codec
        from stepjax.tofc.codec import Limits
        from stepjax.tofc.device import CODEC, codec_directory
        from stepjax.tofc.tables import Tables

        if not self.files:
            raise ConfigError("FILE: name at least one")
        tables, limits, arrays = Tables.load(codec_directory(self.directory) / CODEC), Limits(), {}
        frames = {}
        for path in self.files:
            with path.open("rb") as file:
                frame = frames[str(path)] = file.read(limits.frame_bytes + 1)
            tiles = codec.decode(tables, frame, limits=limits)
            columns = codec.parse(frame).columns
            prefix = f"{path.stem}/" if len(self.files) > 1 else ""
            arrays |= {f"{prefix}tile_{index}": tile for index, tile in enumerate(tiles)}
            arrays[f"{prefix}columns"] = np.array(columns)
            values = sum(tile.size for tile in tiles)
            print(
                f"{printable(str(path))}: {len(frame):,} bytes of codec {tables.id}: {len(tiles) - 1} crops and a "
                f"global view, {8 * len(frame) / values:.2f} bits a value",
                file=sys.stderr,
            )
        if self.out is not None:
            np.savez(self.out, **arrays)
        return 0 if self.prompt is None else self._answer(self.prompt, frames)

    def _answer(self, prompt: str, frames: dict[str, bytes]) -> int:
        from stepjax.inference.config import EngineConfig
        from stepjax.inference.engine import Engine
        from stepjax.interop.codec_files import load_codec
        from stepjax.interop.load import load_model, load_processor
        from stepjax.interop.orbax_directory import OrbaxDirectory
        from stepjax.processing.processor import Processor
        from stepjax.tofc.codec import decode_image

        source = OrbaxDirectory(self.directory)
        tables, model, processor = load_codec(source), load_model(source), load_processor(source)
        config = source.spec.images
        assert config is not None and isinstance(processor, Processor)

        def received(path: str, **_: Any):
            return decode_image(tables, frames[path], config)

        content = [{"type": "image", "image": path} for path in frames]
        content.insert(0 if self.prompt_first else len(content), {"type": "text", "text": prompt})
        example = processor.process_prompt([{"role": "user", "content": content}], open_image=received)
        engine = Engine(model, processor, EngineConfig(max_sequences=self.sampling.n), donate=True)
        ((*completions,),) = engine.generate([example], self.sampling)
        for completion in completions:
            print(printable(completion.text) if sys.stdout.isatty() else completion.text)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofcEvaluate(Eval):
    """Score a run's answers to questions whose images are encoded, decoded and only then seen, and count the bytes.

    Writes tofc_evaluation.json (the results) and tofc_contact_sheet.png (sample answers) to the run's directory.
    """

    def run(self) -> int:
        """
        Raises:
            StepjaxError: the run or the data cannot be used, or an option does not apply to them.
        """
        from stepjax.evaluation.coded import evaluate_coded
        from stepjax.interop.codec_files import load_codec
        from stepjax.interop.load import load_model, load_processor
        from stepjax.interop.orbax_directory import OrbaxDirectory
        from stepjax.models.step_vl import StepVL
        from stepjax.processing.processor import Processor
        from stepjax.tofc.device import Device

        source = OrbaxDirectory(self.directory)
        if source.run is None:
            raise ConfigError(f"{self.directory} is a converted checkpoint, not a run")
        load_codec(source)  # checks that it is the run's
        config, title = self.chosen(source.run)
        model, processor = load_model(source), load_processor(source)
        assert isinstance(model, StepVL) and isinstance(processor, Processor)
        device = Device(self.directory)
        evaluated, sizes = evaluate_coded(model, processor, device, config.evaluation, seed=config.seed)
        show(
            evaluated,
            config,
            self.place(config),
            f"{title}, coded",
            prefix="tofc_",
            codec=device.tables.sha256,
            **sizes,
        )
        print(
            f"{sizes['pictures']} pictures: {sizes['bytes']:.1f} bytes on average, 95th percentile "
            f"{sizes['bytes_95']:.0f}; {sizes['payload']:.1f} without headers and checksums, where training estimates "
            f"{sizes['estimate']:.1f}; {sizes['encoder_ms']:.1f} + {sizes['coder_ms']:.1f} ms (encoder, coder)"
        )
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofcPage:
    """Write a page, one HTML file, with a slider for lambda: what a device sends of an image, what the model answers.

    The runs are of one recipe with another `model.tofc.rate_weight` each; their devices and codecs make all that the
    page shows. Without --image and --prompt it is about the first held-out questions of the runs.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: Path  # the page
    image: tuple[str, ...] = ()  # image files
    prompt: tuple[str, ...] = ()  # questions about each image
    prompt_first: bool = False  # before the image, for a model that was trained so
    base: str | None = None  # a run without a codec: the last stop, where the model sees the image itself
    examples: int = 6  # held-out questions, without --image
    quality: int = 50  # of WebP and AVIF, whose bytes are beside those of the frame
    max_tokens: int = 128  # of an answer, with its reasoning

    def run(self) -> int:
        """
        Raises:
            StepjaxError: a run or an image cannot be used, or they do not go together.
        """
        if not self.runs:
            raise ConfigError("RUN: name at least one")
        if bool(self.image) != bool(self.prompt):
            raise ConfigError("--image and --prompt go together: give both, or neither for held-out questions")
        require_positive("", self, "examples", "max_tokens")
        require("", self, quality=(1 <= self.quality <= 100, "must be 1 to 100"))
        require("", self, out=(not self.out.is_dir(), "is a directory; name a file"))
        from stepjax.evaluation.coded_page import held_out, pictures_of, write_page

        pictures = pictures_of(self.image, self.prompt, prompt_first=self.prompt_first)
        data = write_page(
            self.out,
            self.runs,
            lambda config: pictures or held_out(config, self.examples),
            base=self.base,
            quality=self.quality,
            max_tokens=self.max_tokens,
        )
        size = self.out.stat().st_size
        print(f"{len(data['pictures'])} images at {len(data['stops'])} stops in {self.out}: {size / 1e6:.1f} MB")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofcAsk:
    """Ask a server about an image as a device does: encode it, send the frame, print the answer, bytes and times.

    If the server cannot read the frame, the image follows as int8 features, then as JPEG. STEPJAX_API_KEY is sent as
    the key. It needs what `stepjax tofc encode` needs.
    """

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]  # such as http://192.168.0.7:8000/v1
    directory: Run  # a run, or a copy of its directory `tofc`
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]  # an image file
    prompt: str  # the question
    prompt_first: bool = False  # before the image, for a model that was trained so
    max_tokens: int = 128  # of the answer, with its reasoning
    temperature: float = 0.0  # 0: greedy
    seed: int = 0
    thinking: bool | None = None  # start with reasoning, or skip it; None: the server's default
    policy: Annotated[Policy, tyro.conf.arg(name="")] = Policy()

    def run(self) -> int:
        """
        Raises:
            AnswerError: the server refuses, or does not answer; see its subclasses.
            StepjaxError: the run, the image or the URL cannot be used.
        """
        from stepjax.processing.image_files import open_image
        from stepjax.tofc.client import Server, ask
        from stepjax.tofc.device import Device

        device, image = Device(self.directory), open_image(self.image, name=self.image)
        device.features(image)  # compiles, where that is not done yet
        fields: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        key = (os.environ.get(KEY_VARIABLE) or "").partition(",")[0].strip() or None
        with Server(self.url, key) as server:
            first = self.prompt_first
            answer = ask(server, device, image, self.prompt, prompt_first=first, policy=self.policy, **fields)
        print(printable(answer.text) if sys.stdout.isatty() else answer.text)
        if answer.finish_reason == "length":
            print(f"(cut off after --max-tokens {self.max_tokens})", file=sys.stderr)
        *failed, last = answer.attempts
        for attempt in failed:
            print(f"{attempt.form}: {attempt.sent:,} bytes, {printable(attempt.reason)}", file=sys.stderr)
        print(
            f"{last.form}: {last.sent:,} bytes sent; encoded in {answer.encode_ms:.1f} ms, sent in "
            f"{answer.send_ms:.1f} ms, answered in {answer.answer_ms:.1f} ms",
            file=sys.stderr,
        )
        return 0
