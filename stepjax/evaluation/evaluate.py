"""Ask a model held-out questions and score the answers."""

import dataclasses
from collections.abc import Callable

from stepjax.config import DigitsSource, EvaluationConfig
from stepjax.data.records import open_source
from stepjax.errors import ConfigError
from stepjax.evaluation.contact_sheet import Item
from stepjax.evaluation.scoring import TaskResult, chance_level, score
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.models.step_vl import StepVL
from stepjax.processing.image_files import open_image
from stepjax.processing.processor import Processor


@dataclasses.dataclass(frozen=True)
class Report:
    results: tuple[TaskResult, ...]
    items: tuple[Item, ...]  # every question with its answer


def evaluate(
    model: StepVL,
    processor: Processor,
    config: EvaluationConfig,
    *,
    seed: int,
    progress: Callable[[str], None] = lambda message: None,
) -> Report:
    """Greedy answers to the first `config.examples` records of every source.

    Raises:
        ConfigError: there are no sources.
    """
    if not config.sources:
        raise ConfigError("evaluation.sources=(): name at least one source")
    rows, longest = config.batch_size, model.config.decoder.max_positions
    # One size of batch and no groups: compiling more would take longer than the questions. Room in the cache for a
    # batch of questions about large images; where they are longer, fewer are answered at a time.
    sizes = EngineConfig(
        max_sequences=rows,
        smallest_batch=rows,
        max_problems=1,
        page_size=16,
        cache_tokens=max(longest, rows * min(longest, 4096 + config.max_new_tokens)),
        prefill_tokens=128,
        view_batch=8,
    )
    engine = Engine(model, processor, sizes)
    params = SamplingParams(temperature=0.0, max_tokens=config.max_new_tokens)
    results, items = [], []
    for source in config.sources:
        assert isinstance(source, DigitsSource), source
        questions = open_source(source, seed)
        records = [questions[i] for i in range(config.examples)]
        prompts = (processor.process_prompt(record["messages"][:-1], name=record["id"]) for record in records)
        correct = 0
        for record, (answer,) in zip(records, engine.generate(prompts, params), strict=True):
            right = score(record, answer.text)
            correct += right
            items.append(Item(record, _first_image(record), answer.text, right))
        results.append(TaskResult(source.name, correct, config.examples, chance_level(source)))
        progress(f"evaluated {source.name}: {correct}/{config.examples} right")
    return Report(tuple(results), tuple(items))


def _first_image(record: dict):
    for message in record["messages"]:
        if isinstance(message["content"], list):
            for item in message["content"]:
                if item["type"] == "image":
                    return open_image(item["image"], name=record["id"])
    return None
