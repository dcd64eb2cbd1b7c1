"""Ask a model held-out questions and score the answers; measure the loss of held-out documents.

Legend: B rows, T tokens, G global views, C crops, F features.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import DigitsSource, EvaluationConfig, ImageConfig
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack
from stepjax.data.records import open_source
from stepjax.errors import ConfigError, RecordError
from stepjax.evaluation.contact_sheet import Item
from stepjax.evaluation.scoring import TaskResult, chance_level, is_question, score
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.models.step_vl import StepVL
from stepjax.processing.image_files import open_image
from stepjax.processing.processor import Processor
from stepjax.processing.tokens import Example
from stepjax.sharding import num_parts
from stepjax.training.losses import next_tokens, token_scores


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
    """Greedy answers to the first `config.examples` records of every source; see `score` for what is right.

    Records that ask nothing (documents, and conversations that the user ends) count by their loss, as in training.

    Raises:
        ConfigError: there are no sources.
        RecordError: a record is malformed, does not say what its answer is, or does not fit the model's positions.
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
        opened = open_source(source, seed)
        records = [opened[i] for i in range(min(config.examples, len(opened)))]
        questions = [record for record in records if is_question(record)]
        documents = [record for record in records if not is_question(record)]
        prompts = (
            processor.process_prompt(record["messages"][:-1], tools=record.get("tools"), name=record["id"])
            for record in questions
        )
        correct = 0
        for record, (answer,) in zip(questions, engine.generate(prompts, params), strict=True):
            right = score(record, answer.text)
            correct += right
            items.append(Item(record, _first_image(record), answer.text, right))
        loss = _mean_loss(model, map(processor.process, documents), processor.image_config) if documents else None
        chance = chance_level(source) if isinstance(source, DigitsSource) else None
        results.append(TaskResult(source.name, correct, len(questions), chance, loss))
        told = [f"{correct}/{len(questions)} right"] if questions else []
        told += [] if loss is None else [f"loss {loss:.4f} on {len(documents)} documents"]
        progress(f"evaluated {source.name}: {', '.join(told)}")
    return Report(tuple(results), tuple(items))


def _mean_loss(model: StepVL, examples: Iterable[Example], images: ImageConfig) -> float:
    """Cross-entropy of the trained tokens of all examples, in nats a token.

    Rows hold an example each and are as long as the next power of two, so that few shapes are compiled.

    Raises:
        RecordError: an example is longer than the model's positions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = 1 if mesh.empty else num_parts("batch", mesh)
    longest, total, weight = model.config.decoder.max_positions, 0.0, 0.0
    # Rows of a call are of like size where records of a source are; a call more is cheaper than sorting all of them.
    examples = iter(examples)
    while batch := list(itertools.islice(examples, rows)):
        for example in batch:
            if len(example.tokens) > longest:
                raise RecordError(
                    f"record {example.name!r} has {len(example.tokens)} tokens, and the model {longest} positions: "
                    "shorten it, or leave it out"
                )
        tokens, views, crops = (
            max(smallest, 1 << (max(map(size, batch)) - 1).bit_length())
            for size, smallest in (
                (lambda example: len(example.tokens), 64),
                (lambda example: len(example.global_views), 1),
                (lambda example: len(example.crops), 1),
            )
        )
        budget = RowBudget(min(tokens, longest), views, crops, images)
        packed = [pack([Sample(example, 0)], budget) for example in batch]
        packed += [pack([], budget)] * (rows - len(packed))
        # The names of a row's arrays end in their axes; those of a batch have B in front of them.
        arrays = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
        loss, counted = _loss_sum(model, arrays)
        total, weight = total + float(loss), weight + float(counted)
    return total / weight


@jax.jit
def _loss_sum(model: StepVL, row: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the token losses of packed rows, and of the weights."""
    hidden_BTD = model(
        tokens_BT=row["tokens_T"],
        positions_BT=row["positions_T"],
        segment_ids_BT=row["segment_ids_T"],
        feature_index_BT=row["feature_index_T"],
        global_views_BGHWC=row["global_views_GHWC"],
        crops_BCHWC=row["crops_CHWC"],
    )
    targets_BT, weights_BT = next_tokens(row["tokens_T"], row["loss_weights_T"])
    chunk = model.decoder.numerics.loss_chunk
    scores = token_scores(hidden_BTD, model.decoder.head(), targets_BT, chunk=chunk)
    return -jnp.sum(weights_BT * scores.log_probs_BT), jnp.sum(weights_BT)


def _first_image(record: dict):
    for message in record["messages"]:
        if isinstance(message["content"], list):
            for item in message["content"]:
                if item.get("type") == "image":
                    return open_image(item["image"], name=record["id"], frame=item.get("frame"))
    return None
