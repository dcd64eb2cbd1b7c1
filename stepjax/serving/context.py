"""State the routes share: settings, threads, admission, metrics and the model's names."""

import dataclasses
import time
from collections.abc import Awaitable, Callable

from stepjax.inference.request import EngineClient
from stepjax.interop.text_processor import AnyProcessor
from stepjax.pacore.config import PRESETS, PacoreConfig, Schedule
from stepjax.serving.errors import ApiError, invalid
from stepjax.serving.features import Receiver
from stepjax.serving.fetch import Fetcher
from stepjax.serving.metrics import Metrics
from stepjax.serving.prompts import PromptMaker
from stepjax.serving.settings import ServerSettings
from stepjax.serving.streams import Bodies, Json
from stepjax.serving.threads import Admission, Threads
from stepjax.tofc.tables import Tables


@dataclasses.dataclass(frozen=True)
class ChosenModel:
    """
    Attributes:
        name: as in the request, or the model's own.
        schedule: the PaCoRe schedule that the name asks for, if any.
    """

    name: str
    schedule: Schedule | None = None


class Context:
    """State of any server. Requests use the model's name, or `NAME:pacore-low` and so on for PaCoRe."""

    def __init__(
        self,
        settings: ServerSettings,
        pacore: PacoreConfig,
        *,
        model_name: Callable[[], Awaitable[str]],
        max_context: int | None,
        default_schedule: Schedule | None = None,
        engine: EngineClient | None = None,
    ):
        """
        Args:
            pacore: defaults for requests with PaCoRe.
            model_name: returns the model's own name; asks the upstream if there is one.
            max_context: the model's context in tokens, if known.
            default_schedule: the PaCoRe schedule for the model's own name; None answers it without PaCoRe.
        """
        self.settings, self.pacore, self.max_context = settings, pacore, max_context
        self.threads = Threads(settings.workers, "requests")
        self.admission = Admission(settings.limits.requests, lambda: engine is None or engine.healthy)
        self.bodies = Bodies(max(settings.limits.requests, 64), settings.limits)
        self.metrics = Metrics(engine, self.admission)
        self._model_name, self._default_schedule = model_name, default_schedule
        self._created = int(time.time())

    def close(self) -> None:
        self.threads.close()

    async def choose(self, asked: str | None) -> ChosenModel:
        """Raises ApiError: 404, unknown model; 502, the upstream did not report a model name."""
        own = await self._model_name()
        if asked is None or asked == own:
            return ChosenModel(own)
        for preset, schedule in PRESETS.items():
            if asked == f"{own}:pacore-{preset}":
                return ChosenModel(asked, schedule)
        message = f"model {asked[:200]!r} does not exist; use {own!r}, or '{own}:pacore-low' and the like"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def models(self) -> list[Json]:
        """The models of OpenAI's API, the model's own name first. `pacore` has the schedule. Raises as `choose`."""
        own = await self._model_name()
        schedules = {own: self._default_schedule, **{f"{own}:pacore-{name}": each for name, each in PRESETS.items()}}
        common: Json = {"object": "model", "created": self._created, "owned_by": "stepjax"}
        if self.max_context is not None:
            common["max_model_len"] = self.max_context
        return [
            {"id": name, **common, **({} if schedule is None else {"pacore": {"schedule": list(schedule)}})}
            for name, schedule in schedules.items()
        ]

    def check_samples(self, n: int, prompts: int = 1) -> None:
        """Raises ApiError: 400, the request asks for too many samples."""
        most = self.settings.limits.samples
        if n * prompts > most:
            many = "" if prompts == 1 else f"{prompts} prompts with "
            message = f"{many}n={n}: {n * prompts} samples are more than the limit of {most} for a request"
            raise invalid(message, "n" if n > 1 else "prompt")


class EngineContext(Context):
    """State of a server with its own engine."""

    def __init__(
        self,
        engine: EngineClient,
        processor: AnyProcessor,
        settings: ServerSettings,
        pacore: PacoreConfig,
        codec: Tables | None = None,
    ):
        name = settings.model_name
        assert name is not None

        async def model_name() -> str:
            return name

        super().__init__(settings, pacore, model_name=model_name, max_context=engine.max_context, engine=engine)
        limits = settings.limits
        self.engine, self.processor = engine, processor
        # Slow images then delay only other requests with images.
        self.image_threads, self._fetches = Threads(settings.workers, "images"), Threads(8, "fetches")
        fetcher = Fetcher(self._fetches, max_bytes=limits.image_bytes, seconds=settings.fetch_seconds)
        self.prompts = PromptMaker(
            processor,
            Receiver(codec, getattr(processor, "image_config", None), limits, self.metrics),
            limits,
            max_context=engine.max_context,
            threads=self.threads,
            image_threads=self.image_threads,
            fetcher=fetcher if settings.allow_remote_images else None,
        )

    def close(self) -> None:
        for each in (self.threads, self.image_threads, self._fetches):
            each.close()
