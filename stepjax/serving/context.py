"""What the routes share."""

import dataclasses

from stepjax.interop.text_processor import AnyProcessor
from stepjax.serving.admission import Admission
from stepjax.serving.engine import AsyncEngine
from stepjax.serving.errors import ApiError
from stepjax.serving.metrics import Metrics
from stepjax.serving.model_names import ModelNames
from stepjax.serving.prompts import PromptMaker
from stepjax.serving.settings import ServerSettings
from stepjax.serving.threads import Threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Of any server."""

    names: ModelNames
    threads: Threads
    admission: Admission
    metrics: Metrics
    settings: ServerSettings

    def check_samples(self, n: int, prompts: int = 1) -> None:
        """
        Raises:
            ApiError: 400, a request wants too many samples.
        """
        most = self.settings.limits.samples
        if n * prompts > most:
            many = "" if prompts == 1 else f"{prompts} prompts with "
            message = f"{many}n={n}: {n * prompts} samples are more than the limit of {most} for a request"
            raise ApiError(400, message, param="n" if n > 1 else "prompt", code="invalid_value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineContext(Context):
    """Of a server that has the model."""

    engine: AsyncEngine
    processor: AnyProcessor
    prompts: PromptMaker
