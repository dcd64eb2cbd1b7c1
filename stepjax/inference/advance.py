"""What the tokens of a decoding call do to a sample: which of them count, what text they make, whether it ends."""

from typing import Any

from stepjax.inference.programs import Drawn
from stepjax.inference.request import Delta, TokenLogprob
from stepjax.inference.sequence import Sequence


def make_delta(sequence: Sequence, **fields: Any) -> Delta:
    prompt = sequence.prompt
    return Delta(
        prompt.request_id,
        sequence.sample,
        seed=prompt.seed,
        num_prompt_tokens=len(prompt.tokens_T),
        num_cached_tokens=prompt.num_cached or 0,
        **fields,
    )


def advance(sequence: Sequence, drawn: Drawn, row: int, stop_ids: frozenset[int]) -> Delta:
    """Appends the drawn tokens of a row up to the one that ends the sample, and says what is new."""
    params = sequence.prompt.params
    ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else stop_ids)
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    text, finish, reason = "", None, None
    for i, token in enumerate(drawn.tokens_IB[:, row].tolist()):
        if token < 0:
            finish, reason = "error", f"the logits at position {sequence.length} are not finite"
            break
        if token in ends:
            finish, reason = "stop", token if token in params.stop_ids else None
            break
        tokens.append(token)
        sequence.generated.append(token)
        if params.logprobs is not None:
            logprobs.append(_logprob(drawn, i, row, params.logprobs))
        if sequence.text is not None:
            text += sequence.text.add(token)
            if sequence.text.stopped_by is not None:
                finish, reason = "stop", sequence.text.stopped_by
                break
        if sequence.length >= sequence.prompt.limit:
            finish = "length"
            break
    if finish is not None and sequence.text is not None:
        text += sequence.text.finish()
        if sequence.text.stopped_by is not None:  # the stop string ended with the last character
            finish, reason = "stop", sequence.text.stopped_by
    return make_delta(
        sequence,
        tokens=tuple(tokens),
        text=text,
        logprobs=tuple(logprobs),
        finish_reason=finish,
        stop_reason=reason,
    )


def _logprob(drawn: Drawn, i: int, row: int, num_top: int) -> TokenLogprob:
    top = zip(
        drawn.top_tokens_IBL[i, row, :num_top].tolist(), drawn.top_logprobs_IBL[i, row, :num_top].tolist(), strict=True
    )
    return TokenLogprob(
        token=int(drawn.tokens_IB[i, row]),
        logprob=float(drawn.logprobs_IB[i, row]),
        sampling_logprob=float(drawn.sampling_logprobs_IB[i, row]),
        top=tuple(top),
    )
