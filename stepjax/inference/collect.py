"""Deltas put together to whole samples."""

from collections import defaultdict
from collections.abc import AsyncIterable, Iterable

from stepjax.inference.request import Completion, Delta


class Collector:
    """Takes the deltas of any number of requests, in the order in which the engine gives them."""

    def __init__(self):
        self._deltas: dict[str, dict[int, list[Delta]]] = defaultdict(lambda: defaultdict(list))

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            self._deltas[delta.request_id][delta.sample].append(delta)

    def completions(self, request_id: str) -> list[Completion]:
        """The samples of a request whose samples have all ended, in order; they are forgotten then."""
        return [joined(deltas) for _, deltas in sorted(self._deltas.pop(request_id).items())]


async def collected(stream: AsyncIterable[Delta]) -> list[Completion]:
    """The samples of one request, in order, when its stream has ended."""
    deltas: dict[int, list[Delta]] = defaultdict(list)
    async for delta in stream:
        deltas[delta.sample].append(delta)
    return [joined(of_sample) for _, of_sample in sorted(deltas.items())]


def joined(deltas: list[Delta]) -> Completion:
    """The deltas of one sample, the last of which says why it ended."""
    last = deltas[-1]
    assert last.finish_reason is not None, f"sample {last.sample} of {last.request_id} has not ended"
    return Completion(
        sample=last.sample,
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        text="".join(delta.text for delta in deltas),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        seed=last.seed,
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
    )
