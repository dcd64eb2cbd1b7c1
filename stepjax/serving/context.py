"""What the routes share."""

import dataclasses

from stepjax.interop.any_processor import AnyProcessor
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

    def check_samples(self, count: int) -> None:
        """
        Raises:
            ApiError: 400, a request wants too many samples.
        """
        if count > self.settings.limits.samples:
            message = f"n={count} samples are more than the limit of {self.settings.limits.samples} for a request"
            raise ApiError(400, message, param="n", code="invalid_value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineContext(Context):
    """Of a server that has the model."""

    engine: AsyncEngine
    processor: AnyProcessor
    prompts: PromptMaker
