"""Ask a model held-out questions and score the answers."""

import dataclasses
from collections.abc import Callable

from stepjax.config import DigitsSource, EvaluationConfig
from stepjax.data.records import open_source
from stepjax.errors import ConfigError
from stepjax.evaluation.contact_sheet import Item
from stepjax.evaluation.scoring import TaskResult, chance_level, score
from stepjax.inference.generate import generate
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
    results, items = [], []
    for source in config.sources:
        assert isinstance(source, DigitsSource), source
        records = open_source(source, seed)
        correct = 0
        for start in range(0, config.examples, config.batch_size):
            batch = [records[i] for i in range(start, min(start + config.batch_size, config.examples))]
            prompts = [processor.process_prompt(record["messages"][:-1], name=record["id"]) for record in batch]
            generations = generate(
                model,
                prompts,
                processor.image_config,
                stop_ids=processor.tokenizer.stop_ids,
                max_new_tokens=config.max_new_tokens,
            )
            for record, generation in zip(batch, generations, strict=True):
                text = processor.decode(generation.tokens)
                right = score(record, text)
                correct += right
                items.append(Item(record, _first_image(record), text, right))
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
