"""How well a run reads receipts: greedy, and 8 samples at temperature 1, on 500 held-out images.

    python benchmarks/receipts.py RUN [RUN ...] [--images 500] [--samples 8] [--seed 1]

A receipt is right if all its digits are. `measure` gives the figures of a model; the receipts are those of the recipe's
evaluation (same degradation), under another seed than the evaluation's.

    greedy                 share of images that are right at temperature 0
    mean@8                 mean over images of the share of right samples; its interval is over images
    pass@8, majority@8     any sample is right; the most frequent message is
    checked majority       the most frequent of the messages that say "ok", if there are any
    digits                 share of digits that are right, greedy and sampled; `last` is that of the last digit
    honest ok, honest bad  share of right samples that say "ok", and of wrong ones that say "bad"
    malformed, cut         samples that are no receipt; samples that ran into the limit of tokens
    sums, copies           well-formed samples whose running sums, or whose copy of the digits, have a mistake
    rereads, mended        samples with a second reading; those of them that are right
    entropy                nats per sample and per token, estimated as the mean of -log p of the samples
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from stepjax.config import DigitsSource
from stepjax.data.receipts import parse_receipt
from stepjax.data.records import open_source
from stepjax.figures import NORMAL_QUANTILE, wilson_interval
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.interop.load import load_run
from stepjax.rewards.verify import is_right
from stepjax.rollouts.engine import rollout_of
from stepjax.rollouts.rollout import Rollout

MAX_TOKENS = 136  # three readings of ten digits have 131
SEQUENCES = 128

_STEP = re.compile(r"([A-Z=])(\d)(\d)")  # label, digit, sum so far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--degradation", type=float, help="of the images, instead of the recipe's")
    parser.add_argument("--examples", type=int, default=0, help="print this many wrong samples")
    arguments = parser.parse_args()
    for run in arguments.runs:
        model, processor, config = load_run(run)
        source = receipts_of(config.evaluation.sources)
        if arguments.degradation is not None:
            source = dataclasses.replace(source, degradation=arguments.degradation)
        records = open_source(source, arguments.seed)
        records = [records[i] for i in range(arguments.images)]
        figures, sampled = measure(model, processor, records, arguments.samples, arguments.seed)
        print(f"{run}, degradation {source.degradation}\n{json.dumps(figures, indent=1)}", flush=True)
        wrong = [(record, s) for record, group in sampled for s in group if not is_right(record, s.content)]
        for record, sample in wrong[:: max(1, len(wrong) // max(1, arguments.examples))][: arguments.examples]:
            print(f"{record['answer']['text']}   {(sample.reasoning or '').strip()}   {sample.content.strip()}")


def receipts_of(sources: Iterable[Any]) -> DigitsSource:
    """The first source of receipts."""
    found = [each for each in sources if isinstance(each, DigitsSource) and each.task == "receipt"]
    if not found:
        sys.exit("the run evaluates no receipts: give a run of configs/digits/sft.py, or one that began with it")
    return found[0]


def measure(
    model: Any, processor: Any, records: Sequence[dict[str, Any]], samples: int, seed: int
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], list[Rollout]]]]:
    """Returns the figures, and the samples of every record."""
    engine = Engine(model, processor, EngineConfig(max_sequences=SEQUENCES, smallest_batch=SEQUENCES, max_context=256))
    engine.warm_up(top_logprobs=False)
    started = time.perf_counter()
    greedy = rollouts(engine, processor, records, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    params = SamplingParams(n=samples, max_tokens=MAX_TOKENS, seed=seed, logprobs=0)
    sampled = rollouts(engine, processor, records, params)
    seconds = time.perf_counter() - started

    right = [[is_right(record, each.content) for each in group] for record, group in zip(records, sampled, strict=True)]
    shares = [statistics.fmean(group) for group in right]
    mean = statistics.fmean(shares)
    radius = NORMAL_QUANTILE * statistics.stdev(shares) / math.sqrt(len(shares))
    pairs = flat(records, sampled)
    parsed = [(record, each, parse_receipt(each.content)) for record, each in pairs]
    well = [(record, each, receipt) for record, each, receipt in parsed if receipt]
    said = Counter((is_right(record, each.content), receipt.is_ok) for record, each, receipt in well)
    nats = [-sum(each.logprobs) for _, each in pairs]
    reread = [(record, each) for record, each in pairs if len(readings(each)) > 1]
    figures = {
        "images": len(records),
        "samples": samples,
        "greedy": proportion([is_right(record, each.content) for record, (each,) in zip(records, greedy, strict=True)]),
        f"mean@{samples}": {"accuracy": mean, "low": mean - radius, "high": mean + radius},
        f"pass@{samples}": proportion(map(any, right)),
        f"majority@{samples}": proportion(vote(*each, checked=False) for each in zip(records, sampled, strict=True)),
        "checked majority": proportion(vote(*each, checked=True) for each in zip(records, sampled, strict=True)),
        "digits": {
            "greedy": statistics.fmean(itertools.chain(*itertools.starmap(digits_right, flat(records, greedy)))),
            "sampled": statistics.fmean(itertools.chain(*itertools.starmap(digits_right, pairs))),
            "last": statistics.fmean(digits_right(*pair)[-1] for pair in pairs),
        },
        "honest ok": said[True, True] / max(1, said[True, True] + said[True, False]),
        "honest bad": said[False, False] / max(1, said[False, True] + said[False, False]),
        "malformed": 1 - len(well) / len(pairs),
        "cut": statistics.fmean(each.finish_reason == "length" for _, each in pairs),
        "sums": statistics.fmean(not sums_are_right(each) for _, each, _ in well) if well else None,
        "copies": statistics.fmean(digits_thought(each) != receipt.digits for _, each, receipt in well)
        if well
        else None,
        "rereads": len(reread) / len(pairs),
        "mended": statistics.fmean(is_right(record, each.content) for record, each in reread) if reread else None,
        "entropy": {
            "sample": statistics.fmean(nats),
            "token": sum(nats) / sum(len(each.logprobs) for _, each in pairs),
        },
        "tokens": statistics.fmean(each.num_tokens for _, each in pairs),
        "seconds": round(seconds, 1),
    }
    return figures, list(zip(records, sampled, strict=True))


def rollouts(engine: Engine, processor: Any, records: Sequence[dict[str, Any]], params: Any) -> list[list[Rollout]]:
    prompts = [processor.process_prompt(record["messages"][:-1], name=record["id"]) for record in records]
    made = engine.generate(prompts, params)
    return [
        [rollout_of(each, prompt.tokens, processor) for each in group]
        for group, prompt in zip(made, prompts, strict=True)
    ]


def flat(
    records: Sequence[dict[str, Any]], groups: Sequence[Sequence[Rollout]]
) -> list[tuple[dict[str, Any], Rollout]]:
    return [(record, each) for record, group in zip(records, groups, strict=True) for each in group]


def proportion(outcomes: Iterable[bool]) -> dict[str, float]:
    outcomes = list(outcomes)
    low, high = wilson_interval(sum(outcomes), len(outcomes))
    return {"accuracy": statistics.fmean(outcomes), "low": low, "high": high}


def vote(record: dict[str, Any], group: Sequence[Rollout], *, checked: bool) -> bool:
    """Whether the most frequent message is right; `checked`: of those that say "ok", if there are any."""
    receipts = [receipt for each in group if (receipt := parse_receipt(each.content))]
    receipts = [each for each in receipts if each.is_ok] * checked or receipts
    if not receipts:
        return False
    return is_right(record, "ok " + Counter(each.digits for each in receipts).most_common(1)[0][0])


def digits_right(record: dict[str, Any], rollout: Rollout) -> list[bool]:
    """Whether each digit is right; none of a malformed answer is."""
    expected, found = parse_receipt(record["answer"]["text"]), parse_receipt(rollout.content)
    assert expected is not None
    pieces = {found.digits[i : i + 2] for i in range(0, len(found.digits), 2)} if found else set()
    return [expected.digits[i : i + 2] in pieces for i in range(0, len(expected.digits), 2)]


def readings(rollout: Rollout) -> list[list[tuple[str, str, str]]]:
    """Label, digit and running sum at each place, the check's last, in each of the reasoning's readings."""
    return [_STEP.findall(reading) for reading in (rollout.reasoning or "").split("/")]


def digits_thought(rollout: Rollout) -> str:
    """As the last reading has them."""
    return "".join(label + digit for label, digit, _ in readings(rollout)[-1][:-1])


def sums_are_right(rollout: Rollout) -> bool:
    return all(
        total % 10 == int(written)
        for steps in readings(rollout)
        for total, (_, _, written) in zip(itertools.accumulate(int(digit) for _, digit, _ in steps), steps, strict=True)
    )


if __name__ == "__main__":
    main()
