"""What the routes share."""

import dataclasses

from stepjax.interop.any_processor import AnyProcessor
from stepjax.serving.admission import Admission
from stepjax.serving.engine import AsyncEngine
from stepjax.serving.errors import ApiError
from stepjax.serving.metrics import Metrics
from stepjax.serving.prompts import PromptMaker
from stepjax.serving.settings import ServerSettings


@dataclasses.dataclass(frozen=True)
class Context:
    engine: AsyncEngine
    processor: AnyProcessor
    prompts: PromptMaker
    admission: Admission
    metrics: Metrics
    settings: ServerSettings

    def check_model(self, name: str | None) -> None:
        """
        Raises:
            ApiError: 404, another model is asked for.
        """
        if name is not None and name != self.settings.model_name:
            message = f"there is no model {name[:200]!r}; there is {self.settings.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_samples(self, count: int) -> None:
        """
        Raises:
            ApiError: 400, a request wants too many samples.
        """
        if count > self.settings.limits.samples:
            message = f"n={count} samples are more than the limit of {self.settings.limits.samples} for a request"
            raise ApiError(400, message, param="n", code="invalid_value")
