"""What a run reports: a row of metrics an iteration, its log line, a page of samples, and curves."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from stepjax.config import SynthesisSource
from stepjax.figures import human_number, human_time
from stepjax.pacore.compaction import citations
from stepjax.post_training.config import RLConfig
from stepjax.post_training.episodes import Answer, Episode
from stepjax.post_training.sampling import Collected
from stepjax.processing.image_files import open_image
from stepjax.training.run_directory import METRICS

PAGE, CURVES = "samples.html", "curves.png"
_BOUNDS = math.log(2.0)  # the sampler's and the trainer's probabilities should not differ by more than a factor of two
_MOST_CHARACTERS = 4000  # of an answer on the page
_SIDE = 320  # pixels of an image on the page

Row = dict[str, float]


def iteration_row(config: RLConfig, collected: Collected, metrics: dict[str, Any], *, seconds: float) -> Row:
    """The metrics of an iteration, over all processes.

    reward, reward/SOURCE     mean over the sampled answers that have a reward; missing: share of those without
    term/NAME                 mean of a term of the reward, without its weight, over the answers trained on; if it has
                              several
    truncated                 share of the answers that were cut off
    length                    mean tokens of an answer; tokens of the prompts do not count
    dropped, skipped          prompts that the filter left out, and that could not be used
    trained                   answers trained on
    entropy                   estimate: the mean of -log p over the sampled tokens
    clipped, kl_old, kl       share of tokens beyond the clip bounds; divergence from the policy before the updates, and
                              from the model that the run started from
    sampler/...               how far the trainer's log-probabilities are from the engine's: mean, 95th percentile and
                              maximum of the difference, and the share of tokens beyond a factor of 2. (p95 of the first
                              process's answers)
    value/...                 loss, share of values that were clipped, explained variance of the returns
    synthesis/...             of PaCoRe's prompts: the share of answers that cite a reference; the share of answers to
                              prompts whose messages are all known to be wrong (all_wrong), and their mean reward
                              (from_wrong)
    seconds/..., tokens_per_second/...   by phase: sample (with scoring), score (log-probabilities), update
    """
    sampled = _over_processes(collected.sampled)
    count, known, rewards, cut = sampled.sum(axis=0)
    row: Row = {}
    if known:
        row["reward"] = rewards / known
    for source, (_, own_known, own_rewards, _) in zip(config.data.sources, sampled, strict=True):
        if own_known:
            row[f"reward/{source.name}"] = own_rewards / own_known
    answers = [answer for episode in metrics["episodes"] for answer in episode.answers]
    own = np.array([collected.tokens, collected.dropped, len(collected.skipped), len(answers), _num_tokens(answers)])
    tokens, dropped, skipped, trained, trained_tokens = _over_processes(own.astype(np.float64))
    row |= {
        "missing": 1 - known / max(count, 1),
        "truncated": cut / max(count, 1),
        "length": tokens / max(count, 1),
        "dropped": dropped,
        "skipped": skipped,
        "trained": trained,
        "rounds": float(collected.rounds),
    }
    if any(isinstance(source, SynthesisSource) for source in config.data.sources):
        row |= _of_syntheses(metrics["episodes"])
    row |= _of_terms(config, answers)
    row |= _of_answers(config, answers)
    row |= _of_updates(config, metrics)
    phases = {
        "sample": collected.seconds,
        "score": metrics.get("score_seconds"),
        "update": metrics.get("update_seconds"),
    }
    for phase, taken in phases.items():
        if taken:
            row[f"seconds/{phase}"] = taken
            row[f"tokens_per_second/{phase}"] = (tokens if phase == "sample" else trained_tokens) / taken
    row["seconds"] = seconds
    return row


def _of_terms(config: RLConfig, answers: Sequence[Answer]) -> Row:
    names = [term.name for term in config.reward.terms]
    if len(names) == 1:
        return {}
    parts = [[each.scored.parts.get(name) for each in answers] for name in names]
    known = [[value for value in values if value is not None] for values in parts]
    sums = _over_processes(np.array([[len(values), math.fsum(values)] for values in known]))
    return {f"term/{name}": total / count for name, (count, total) in zip(names, sums, strict=True) if count}


def _num_tokens(answers: Sequence[Answer]) -> int:
    return sum(len(answer.mask_L) for answer in answers)


def _over_processes(values: np.ndarray) -> np.ndarray:
    return values if jax.process_count() == 1 else np.sum(multihost_utils.process_allgather(values), axis=0)


def _of_answers(config: RLConfig, answers: Sequence[Answer]) -> Row:
    """Figures of the tokens trained on."""
    if not _over_processes(np.array([float(_num_tokens(answers))]))[0]:
        return {}

    def joined(field: str) -> np.ndarray:
        parts = [getattr(answer, field)[answer.mask_L] for answer in answers]
        return np.concatenate([*parts, np.zeros(0)]).astype(np.float64)

    old, sampler, advantages = joined("old_L"), joined("sampler_L"), joined("advantages_L")
    difference = np.abs(old - sampler)
    sums = np.array([len(old), -old.sum(), difference.sum(), (difference > _BOUNDS).sum(), np.abs(advantages).sum()])
    count, entropy, total, outside, advantage = _over_processes(sums)
    largest = np.max(multihost_utils.process_allgather(np.max(difference, initial=0.0)))
    row = {
        "entropy": entropy / count,
        "advantage": advantage / count,
        "sampler/difference": total / count,
        "sampler/p95": float(np.quantile(difference, 0.95)) if len(difference) else 0.0,
        "sampler/max": float(largest),
        "sampler/outside": outside / count,
    }
    if config.has_critic:
        returns, values = joined("returns_L"), joined("values_L")
        error = returns - values
        count, e1, e2, r1, r2 = _over_processes(
            np.array([len(returns), error.sum(), (error**2).sum(), returns.sum(), (returns**2).sum()])
        )
        variance = r2 / count - (r1 / count) ** 2
        if variance > 1e-6:
            row["value/explained_variance"] = 1 - (e2 / count - (e1 / count) ** 2) / variance
        row["value/mean"] = (r1 - e1) / count
    return row


def _of_syntheses(episodes: Sequence[Episode]) -> Row:
    count = cited = wrong = from_wrong = 0.0
    for episode in episodes:
        rewards = episode.record.get("reference_rewards") or []
        all_wrong = bool(rewards) and all(reward is not None and reward <= 0 for reward in rewards)
        for answer in episode.answers:
            text = f"{answer.rollout.reasoning or ''}\n{answer.rollout.content}"
            count += 1
            cited += bool(citations(text, len(rewards)))
            wrong += all_wrong
            from_wrong += (answer.scored.value or 0.0) * all_wrong
    count, cited, wrong, from_wrong = _over_processes(np.array([count, cited, wrong, from_wrong]))
    row = {"synthesis/cites": cited / max(count, 1), "synthesis/all_wrong": wrong / max(count, 1)}
    return row | ({"synthesis/from_wrong": from_wrong / wrong} if wrong else {})


def _of_updates(config: RLConfig, metrics: dict[str, Any]) -> Row:
    """Figures of the optimiser's steps: the devices have added up the processes already."""
    sums = {name: float(np.sum(jax.device_get(each))) for name, each in metrics.get("sums", {}).items()}
    row: Row = {}
    if tokens := sums.get("tokens"):
        row |= {name: sums[name] / tokens for name in ("clipped", "kl_old", "correction")}
        if config.loss.kl:
            row["kl"] = sums["kl_reference"] / tokens
    if "norms" in metrics:
        norms = np.array(jax.device_get(metrics["norms"]), np.float64)
        row["grad_norm"], row["update_norm"] = norms.mean(axis=0)
        row["loss"] = sums["loss"] / len(norms)
    if "value_loss" in sums:
        row["value/loss"] = sums["value_loss"]
    return row


def format_row(step: int, iterations: int, row: Row) -> str:
    """The log line of an iteration; only what the row has."""
    parts = [f"iteration {step}/{iterations}", human_time(row["seconds"])]
    for key, form in _FIELDS:
        if key in row:
            parts.append(form(row[key]))
    if row.get("missing"):
        parts.append(f"missing {100 * row['missing']:.1f}%")
    if "tokens_per_second/sample" in row:
        parts.append(f"{human_number(row['tokens_per_second/sample'])} tok/s sampled")
    if step < iterations:
        parts.append(f"eta {human_time((iterations - step) * row['seconds'])}")
    return "  ".join(parts)


_FIELDS = (
    ("reward", lambda x: f"reward {x:.3f}"),
    ("length", lambda x: f"length {x:.1f}"),
    ("truncated", lambda x: f"cut off {100 * x:.1f}%"),
    ("entropy", lambda x: f"entropy {x:.3f}"),
    ("clipped", lambda x: f"clipped {100 * x:.1f}%"),
    ("kl", lambda x: f"kl {x:.2g}"),
    ("value/explained_variance", lambda x: f"value {x:.2f}"),
    ("sampler/max", lambda x: f"mismatch {x:.2g}"),
    ("grad_norm", lambda x: f"grad {x:.3g}"),
    ("trained", lambda x: f"trained {x:.0f}"),
)


# The page ------------------------------------------------------------------------------------------------------------


def write_page(directory: Path, config: RLConfig, step: int, collected: Collected) -> None:
    """Writes the page of an iteration's samples, for a person who wants to see what the policy does.

    It shows `shown_prompts` prompts: the answers with their rewards, best first, and what was missing.
    """
    if not config.shown_prompts or not collected.episodes:
        return
    shown = collected.episodes[: config.shown_prompts]
    text = _PAGE.format(
        title=html.escape(f"{config.name}, iteration {step}"), prompts="\n".join(_section(each) for each in shown)
    )
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / (PAGE + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(directory / PAGE)


def _section(episode: Episode) -> str:
    record = episode.record
    answers = sorted(
        episode.answers, key=lambda answer: -(-math.inf if answer.scored.value is None else answer.scored.value)
    )
    gold = (
        "" if record.get("answer") is None else f"<p class=gold>{_text(json.dumps(record['answer'], default=str))}</p>"
    )
    prompt = "".join(_item(item) for message in record["messages"] for item in _items(message))
    return (
        f"<section><h2>{_text(record['id'])}</h2><div class=prompt>{prompt}{gold}</div>"
        + "".join(map(_answer, answers))
        + "</section>"
    )


def _items(message: dict[str, Any]) -> list[dict[str, Any]]:
    if message.get("role") == "assistant":
        return []
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": str(content or "")}]


def _item(item: dict[str, Any]) -> str:
    if item.get("type") != "image":
        return f"<p>{_text(str(item.get('text', '')))}</p>"
    image = open_image(item["image"], name="image", frame=item.get("frame")).convert("RGB")
    if max(image.size) < _SIDE:
        scale = _SIDE // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


def _answer(answer: Answer) -> str:
    scored, rollout = answer.scored, answer.rollout
    reward = "missing" if scored.value is None else f"{scored.value:.3g}"
    kind = "missing" if scored.value is None else "right" if scored.value > 0 else "wrong"
    notes = [
        f"{len(answer.mask_L)} tokens",
        *(f"{name} {value}" for name, value in scored.parts.items()),
        *scored.notes,
    ]
    notes += ["cut off"] * answer.is_truncated
    thought = "" if not rollout.reasoning else f"<pre class=thought>{_text(rollout.reasoning)}</pre>"
    return (
        f"<article class={kind}><b>{reward}</b> <span>{_text(', '.join(notes))}</span>{thought}"
        f"<pre>{_text(rollout.content)}</pre></article>"
    )


def _text(text: object) -> str:
    text = str(text)
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} ... {len(text) - 2 * half} more ... {text[-half:]}"
    return html.escape(text)


_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #1c2026;
  background: #f4f5f7 }}
section {{ background: #fff; border: 1px solid #d8dce2; border-radius: 8px; padding: 1rem 1.2rem; margin: 1rem 0 }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; margin: 0 0 .5rem }}
.gold {{ color: #1a8a4a }} img {{ image-rendering: pixelated; max-width: 100%; border: 1px solid #d8dce2 }}
article {{ border-left: 4px solid #98a0aa; padding: .3rem .8rem; margin: .6rem 0 }}
article.right {{ border-color: #1a8a4a }} article.wrong {{ border-color: #cd3034 }}
article span {{ color: #68707a }} pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 }}
pre.thought {{ color: #68707a }}
</style>
<h1>{title}</h1>
{prompts}
</html>
"""


# Curves --------------------------------------------------------------------------------------------------------------


def draw_curves(directory: Path) -> Path | None:
    """Draws the run's metrics into CURVES; None without matplotlib (`pip install stepjax[plot]`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    path = directory / METRICS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    panels = [
        [key for key in ("reward", "value/explained_variance") if any(key in row for row in rows)],
        ["length"],
        ["entropy"],
        [key for key in ("kl", "kl_old", "sampler/difference") if any(key in row for row in rows)],
        ["truncated", "missing", "clipped"],
        ["seconds/sample", "seconds/score", "seconds/update"],
    ]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, keys in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for key in keys:
            points = [(row["step"], float(row[key])) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, linewidth=1.3)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(directory / CURVES, dpi=110)
    return directory / CURVES
