"""Outcomes as a run leaves them, with all that may go wrong on the way, for the tests of the trace page."""

import dataclasses
import io
import random

from PIL import Image, ImageDraw

from stepjax.pacore.records import Attempt, Outcome, Problem, Reference, Round, Trajectory
from stepjax.rollouts.rollout import Rollout

HOSTILE = (
    "</script><img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script><!-- {{data}}"
)

_SOLUTION = (
    "Let the legs be a and b, with a + b = 17 and ab/2 = 30. Then a^2 + b^2 = 17^2 - 120 = 169, so the hypotenuse is "
    "13 and the radius of the inscribed circle is (a + b - c)/2 = 2.\n\nThe lattice points on the sides follow from "
    "gcd(5, 12) = 1: there are 5 + 12 + 1 = 18 of them.\n\n"
)
_THOUGHT = "We look at the figure first. The legs seem to be 5 and 12, but that has to be shown, not read off.\n" * 12


def drawing(width=900, height=620) -> bytes:
    image = Image.new("RGB", (width, height), "#f4ead5")
    draw = ImageDraw.Draw(image)
    draw.polygon([(80, 540), (820, 540), (80, 120)], outline="#2d6cc2", width=8)
    draw.ellipse((90, 400, 230, 530), outline="#c2452d", width=6)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def problem(**fields) -> Problem:
    text = "A right triangle has perimeter 30 and area 30. How many lattice points lie on its sides?"
    content = [{"type": "image", "image": drawing()}, {"type": "text", "text": text}]
    messages = ({"role": "system", "content": "You are careful."}, {"role": "user", "content": content})
    return Problem(**{"id": "hmmt25-7", "messages": messages, "ground_truth": "18", **fields})


def _answered(round_, index, rng, references, start, answer):
    tokens = rng.randrange(18_000, 64_000) if not round_ else rng.randrange(9_000, 31_000)
    cites = rng.sample(range(1, references + 1), min(references, 3)) if references else []
    said = "".join(f"Reference {n} finds the hypotenuse, and Ref {n} is right about the radius. " for n in cites)
    also = f"References {cites[0]} and {cites[-1]} agree.\n" if cites else ""
    rollout = Rollout(
        content=f"{said}{_SOLUTION}The answer is \\boxed{{{answer}}}.",
        reasoning=_THOUGHT + also,
        seed=rng.randrange(2**53),
        num_prompt_tokens=212 + 900 * references,
        num_cached_tokens=0 if index == 0 else 192 + 896 * references,
        num_tokens=tokens,
        mean_logprob=-rng.random(),
        start=start,
        seconds=tokens / rng.uniform(90, 130),
    )
    return Trajectory(round=round_, index=index, rollout=rollout)


def changed(trajectory, **fields) -> Trajectory:
    """With other fields, its rollout's or its own."""
    own = {name: fields.pop(name) for name in ("status", "error", "attempts") if name in fields}
    return dataclasses.replace(trajectory, rollout=dataclasses.replace(trajectory.rollout, **fields), **own)


def answering(made, **fields) -> Outcome:
    """An outcome whose answer's rollout has other fields."""
    number, index = made.chosen
    trajectories = list(made.rounds[number].trajectories)
    trajectories[index] = changed(trajectories[index], **fields)
    rounds = list(made.rounds)
    rounds[number] = dataclasses.replace(rounds[number], trajectories=tuple(trajectories))
    return dataclasses.replace(made, rounds=tuple(rounds))


def outcome(widths=(16,), *, seed=0, troubled=True, **fields) -> Outcome:
    """A problem's outcome; with `troubled`, the first round loses four calls and the final one needs two tries."""
    rng = random.Random(seed)
    rounds, clock, messages = [], 0.4, ()
    for number, width in enumerate((*widths, 1)):
        is_final = number == len(widths)
        references = list(messages)
        rng.shuffle(references)
        dropped = 0
        if number and troubled and len(references) > 4:
            references[1] = dataclasses.replace(references[1], text="[...] the answer is 18.", was_cut=True)
            references, dropped = references[:-1], 1
        answers = ["18"] * 6 + ["17", "30", "18"]
        made = [
            _answered(number, i, rng, len(references), clock + 0.01 * i, "18" if number else rng.choice(answers))
            for i in range(width)
        ]
        losses = {}
        if not number and troubled and width >= 8:
            made, losses = _with_trouble(made)
        if is_final and troubled:
            failed = Attempt(status="truncated", error="the model wrote no answer", seconds=60.0, output_tokens=8192)
            made = [changed(made[0], start=made[0].rollout.start + 61, attempts=(failed,))]
        messages = tuple(
            Reference(each.index, each.rollout.content or "[...] so 18 remain", not each.rollout.content)
            for each in made
            if each.status == "ok" and (each.rollout.content or each.index == 5)
        )
        if dropped:
            losses["did_not_fit"] = dropped
        rounds.append(
            Round(
                number=number,
                is_final=is_final,
                references=tuple(references),
                trajectories=tuple(made),
                messages=messages,
                losses=losses,
                cut_references=int(bool(dropped)),
                cut_answers=int(bool(losses) and not number),
            )
        )
        clock = max(each.rollout.start + each.rollout.seconds for each in made) + 0.2
    return Outcome(
        **{
            "problem": problem(),
            "answered_by": "synthesis",
            "chosen": (len(rounds) - 1, 0),
            "rounds": tuple(rounds),
            "seconds": clock,
            **fields,
        }
    )


def _with_trouble(made):
    busy = Attempt(status="error", error="status 503: busy", seconds=42.0, output_tokens=3100)
    late = Attempt(status="timeout", error="no answer in time", seconds=90.0)
    gone = Attempt(status="error", error="status 400: no such model", seconds=12.0)
    lost = {"content": "", "mean_logprob": None}
    failed = {"status": "error", "error": gone.error, "finish_reason": "error", "attempts": (gone,)}
    changes = {
        1: {"start": made[1].rollout.start + 133, "attempts": (busy, late)},
        2: {**lost, **failed, "reasoning": None, "seconds": 12.0, "num_tokens": 0},
        3: {**lost, "finish_reason": "length"},
        4: {**lost, "reasoning": None, "num_tokens": 1, "seconds": 0.4},
        5: {**lost, "finish_reason": "length"},  # the end of its reasoning is passed on
        6: {"content": _SOLUTION * 2 + "It remains to show that", "finish_reason": "length"},
        7: {**lost, "status": "cancelled", "reasoning": None, "finish_reason": "cancelled"},
    }
    made = [changed(each, **changes.get(each.index, {})) for each in made]
    return made, {"cancelled": 1, "empty": 1, "error": 1, "truncated": 1}
