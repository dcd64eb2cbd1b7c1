"""The tiny recipe without questions at its end."""

import dataclasses

from tiny_recipe import config as tiny

from stepjax.config import EvaluationConfig

config = dataclasses.replace(tiny, evaluation=EvaluationConfig())
