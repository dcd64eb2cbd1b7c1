"""Ask a model held-out questions and score the answers; measure the loss of held-out documents."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from PIL import Image

from stepjax.config import DigitsSource, DocumentsSource, EvaluationConfig, ImageConfig, MeshConfig, Source
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack_batch
from stepjax.data.records import open_source
from stepjax.errors import ConfigError, RecordError
from stepjax.evaluation.contact_sheet import Item
from stepjax.evaluation.scoring import TaskResult, chance_level, documents_chance_level
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.models.step_vl import StepVL
from stepjax.processing.image_files import open_image
from stepjax.processing.images import CodedImage
from stepjax.processing.processor import Processor
from stepjax.processing.tokens import Example
from stepjax.progress import progress
from stepjax.rewards.verify import is_right
from stepjax.rollouts.engine import rollout_of
from stepjax.rollouts.rollout import Rollout
from stepjax.sharding import axis_size, make_mesh
from stepjax.tasks.gold import is_question
from stepjax.training.losses import token_scores
from stepjax.training.step import Batch, forward

_log = logging.getLogger(__name__)


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
    open_image: Callable[..., Image.Image | CodedImage] = open_image,
    engine: Engine | None = None,
) -> Report:
    """Greedy answers to the first `config.examples` records of every source; see `rewards.verify` for what is right.

    Records that ask nothing (documents, and conversations that the user ends) count by their loss, as in training.

    Args:
        open_image: of questions; see `Processor.process_prompt`.
        engine: of `evaluation_engine`, to evaluate more than once; by default one is made.

    Raises:
        ConfigError: there are no sources.
        RecordError: a record is malformed, does not say what its answer is, or does not fit the model's positions.
    """
    if not config.sources:
        raise ConfigError("evaluation.sources=(): name at least one source")
    engine = evaluation_engine(model, processor, config) if engine is None else engine
    params = SamplingParams(temperature=0.0, max_tokens=config.max_new_tokens)
    results, items = [], []
    opened = [open_source(source, seed) for source in config.sources]
    counts = [min(config.examples, len(records)) for records in opened]
    with progress(sum(counts), unit=" records", description="evaluating", shown=jax.process_index() == 0) as bar:
        for source, all_records, count in zip(config.sources, opened, counts, strict=True):
            records = [all_records[i] for i in range(count)]
            questions = [record for record in records if is_question(record)]
            documents = [record for record in records if not is_question(record)]
            rollouts = rollouts_of(engine, processor, questions, params, open_image)
            correct = 0
            for record, rollout in zip(questions, rollouts, strict=True):
                right = is_right(record, rollout.content)
                correct += right
                items.append(Item(record, _first_image(record), rollout.content, right))
                bar.update()
            loss = None
            if documents:
                loss = _mean_loss(model, map(processor.process, documents), processor.image_config, bar.update)
            chance = _chance(source)
            results.append(TaskResult(source.name, correct, len(questions), chance, loss))
            found = [f"{correct}/{len(questions)} right"] if questions else []
            found += [] if loss is None else [f"loss {loss:.4f} on {len(documents)} documents"]
            _log.info("evaluated %s: %s", source.name, ", ".join(found))
    return Report(tuple(results), tuple(items))


def evaluation_engine(model: StepVL, processor: Processor, config: EvaluationConfig) -> Engine:
    """Answers the questions of `evaluate`."""
    rows, longest = config.batch_size, model.config.decoder.max_positions
    # One size of batch and no groups: compiling more would take longer than the questions. The cache has room for a
    # batch of questions about large images; fewer are answered at a time where they are longer.
    sizes = EngineConfig(
        max_sequences=rows,
        smallest_batch=rows,
        max_prefix_groups=1,
        page_size=16,
        cache_tokens=max(longest, rows * min(longest, 4096 + config.max_new_tokens)),
        prefill_tokens=128,
        view_batch=8,
    )
    return Engine(model, processor, sizes, mesh=_one_device(model))


def _chance(source: Source) -> float | None:
    match source:
        case DigitsSource():
            return chance_level(source)
        case DocumentsSource():
            return documents_chance_level(source)
    return None


def _one_device(model: StepVL) -> Mesh | None:
    """A mesh of one device, if each of several has the whole model: otherwise all would compute the same answers."""
    leaves = jax.tree.leaves(model)
    copies = all(isinstance(leaf, jax.Array) and leaf.is_fully_replicated for leaf in leaves)
    if jax.process_count() > 1 or not copies or len(leaves[0].devices()) == 1:
        return None
    return make_mesh(MeshConfig(), sorted(leaves[0].devices(), key=lambda device: device.id)[:1])


def rollouts_of(
    engine: Engine,
    processor: Processor,
    questions: Iterable[dict[str, Any]],
    params: SamplingParams,
    open_image: Callable[..., Image.Image | CodedImage],
) -> list[Rollout]:
    """The model's answers, one a question. A prompt is made when the engine has room for it.

    Raises:
        RecordError: as `evaluate`.
    """
    prompt_ids = []

    def prompts():
        for record in questions:
            messages, tools, name = record["messages"][:-1], record.get("tools"), record["id"]
            prompt = processor.process_prompt(messages, tools=tools, name=name, open_image=open_image)
            prompt_ids.append(prompt.tokens)
            yield prompt

    completions = [completion for (completion,) in engine.generate(prompts(), params)]
    return [rollout_of(made, ids, processor) for made, ids in zip(completions, prompt_ids, strict=True)]


def _mean_loss(model: StepVL, examples: Iterable[Example], images: ImageConfig, on_done: Callable[[int], Any]) -> float:
    """Cross-entropy of the trained tokens of all examples, in nats a token.

    Rows hold an example each and are as long as the next power of two, so that few shapes are compiled.

    Raises:
        RecordError: an example is longer than the model's positions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = 1 if mesh.empty else axis_size("batch", mesh)
    longest, total, weight = model.config.decoder.max_positions, 0.0, 0.0
    # Neighbours in a source are of like size; one call more costs less than sorting them all.
    examples = iter(examples)
    while group := list(itertools.islice(examples, rows)):
        for example in group:
            if len(example.tokens) > longest:
                raise RecordError(
                    f"record {example.name!r} has {len(example.tokens)} tokens, and the model {longest} positions: "
                    "shorten it, or leave it out"
                )
        tokens = _power_of_two(max(64, *(len(example.tokens) for example in group)))
        views = _power_of_two(max(1, *(len(example.global_views) for example in group)))
        crops = _power_of_two(max(1, *(len(example.crops) for example in group)))
        budget = RowBudget(min(tokens, longest), views, crops, images)
        samples = [[Sample(example, 0)] for example in group] + [[]] * (rows - len(group))
        group_loss, group_weight = _loss_sum(model, pack_batch(samples, budget))
        total, weight = total + float(group_loss), weight + float(group_weight)
        on_done(len(group))
    return total / weight


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@jax.jit
def _loss_sum(model: StepVL, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the token losses of packed rows, and of the weights."""
    hidden_BTD, targets_BT, weights_BT = forward(model, batch)
    scores = token_scores(hidden_BTD, model.decoder.head(), targets_BT, chunk=model.decoder.numerics.loss_chunk)
    return -jnp.sum(weights_BT * scores.log_probs_BT), jnp.sum(weights_BT)


def _first_image(record: dict[str, Any]) -> Image.Image | None:
    for message in record["messages"]:
        if isinstance(message["content"], list):
            for item in message["content"]:
                if item.get("type") == "image":
                    return open_image(item["image"], name=record["id"], frame=item.get("frame"))
    return None
