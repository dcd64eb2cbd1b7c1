"""`stepjax generate`."""

import dataclasses
import sys
from typing import Annotated, Any

import tyro

from stepjax.errors import ConfigError
from stepjax.figures import printable
from stepjax.inference.request import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Answer a prompt, optionally with images."""

    # A run, a Hugging Face directory, or a converted checkpoint.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    prompt: str  # the question
    image: tuple[str, ...] = ()  # image files, shown before the question
    frame: int | None = None  # frame or page to read from an animation or multi-page file, from 0
    thinking: bool | None = None  # start with reasoning, or skip it; None: the model's default
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = SamplingParams(temperature=0.0, max_tokens=64, seed=0)

    def run(self) -> int:
        """
        Raises:
            StepjaxError: the model or an image cannot be used, or the prompt does not fit the context.
        """
        params = self.sampling
        if params.logprobs is not None:
            raise ConfigError(
                f"--logprobs {params.logprobs}: this command prints only text; drop the option, or use stepjax.Engine"
            )
        from stepjax.inference.config import EngineConfig
        from stepjax.inference.engine import Engine
        from stepjax.interop.load import load

        model, processor = load(self.model)
        content: Any = self.prompt
        if self.image:
            images = [{"type": "image", "image": image, "frame": self.frame} for image in self.image]
            content = [*images, {"type": "text", "text": self.prompt}]
        prompt = processor.process_prompt([{"role": "user", "content": content}], enable_thinking=self.thinking)
        room = None if params.max_tokens is None else -(-(len(prompt.tokens) + params.max_tokens) // 64) * 64
        engine = Engine(model, processor, EngineConfig(max_sequences=params.n, max_context=room), donate=True)
        engine.submit(prompt, params)
        texts, is_cut = [""] * params.n, False
        while engine.has_work:
            for delta in engine.step():
                text = printable(delta.text) if sys.stdout.isatty() else delta.text
                texts[delta.sample] += text
                is_cut |= delta.finish_reason == "length"
                if params.n == 1:
                    print(text, end="", flush=True)
        print("\n".join(f"[{i}] {text}" for i, text in enumerate(texts, 1)) if params.n > 1 else "")
        if is_cut:
            print(f"(cut off after --max-tokens {params.max_tokens})", file=sys.stderr)
        return 0
