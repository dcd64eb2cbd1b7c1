"""Decides which sequences run, and which to preempt when pages run out. Pure bookkeeping: never touches a device.

A sequence waits until there are pages for all its tokens so far. Once admitted, it runs until it ends: its prompt is
computed in chunks, then it is decoded together with the others. When a sequence needs a page and none is free, the
sequence admitted last is preempted: it returns to the front of the queue and is recomputed when readmitted. It then
continues unchanged, since a token depends on its position and not on when it is sampled.

The first sample of a request is the leader of the others. It computes the prompt; then its followers share the pages.
Requests that arrive with the same prompt while it is being computed follow too. Followers are not queued until then:
they wait with their leader.
"""

from collections import deque

from stepjax.inference.config import EngineConfig
from stepjax.inference.feature_store import FeatureStore
from stepjax.inference.pages import Key, OutOfPages, Pages
from stepjax.inference.prefill import Part, PrefillShapes
from stepjax.inference.sequence import Sequence, failing_alone


class Scheduler:
    def __init__(self, config: EngineConfig, pages: Pages, store: FeatureStore | None):
        self.config, self.pages, self.store = config, pages, store
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_following = 0  # followers of waiting or running leaders
        self._leaders: dict[bytes, Sequence] = {}  # by prompt: the latest one whose prompt is not computed yet
        self.preemptions = 0
        self.cached_tokens = 0
        self.computed_tokens = 0  # prompt tokens at admission; recomputation counts again

    @property
    def decoding(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.decodes]

    @property
    def prefilling(self) -> list[Sequence]:
        return [sequence for sequence in self.running if not sequence.decodes]

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.num_following

    def add(self, samples: list[Sequence]) -> None:
        """Queues the samples of a request. They follow the first of them or, with prefix caching, another request's
        leader that is about to compute the same prompt.
        """
        key = samples[0].prompt.key
        leader = self._leaders.get(key) if self.config.prefix_caching else None
        if leader is None:
            leader, *samples = samples
            self._leaders[key] = leader
            self.waiting.append(leader)
        self._follow(leader, samples)

    def admit(self) -> None:
        """Admits sequences in order, while there are free slots, pages and room for their image features.

        Raises:
            SequenceError: a sequence cannot be admitted; it stays in the queue.
        """
        while self.waiting and len(self.running) < self.config.max_sequences:
            with failing_alone(self.waiting[0]):
                if not self._take_in(self.waiting[0]):
                    return
            self.waiting.popleft()

    def _take_in(self, sequence: Sequence) -> bool:
        page_size = self.config.page_size
        found = []
        if self.config.prefix_caching:
            # The last token is always decoded, even if its page is cached.
            found = self.pages.find(sequence.extend_keys(sequence.length - 1, page_size))
        needed = -(-sequence.length // page_size) - len(found)
        self.pages.hold(found)
        sequence.pages = found  # `_free` releases them from here on
        # Running sequences will need pages soon: without a reserve, the new one would be preempted at once.
        reserve = len(self.running)
        if needed + reserve > self.pages.num_free:
            self._free(sequence)
            return False
        start = len(found) * page_size
        if sequence.needs_features(start):
            assert self.store is not None
            sequence.views = self.store.hold(sequence.prompt.example, sequence.prompt.digests)
            if sequence.views is None:
                self._free(sequence)
                return False
        sequence.pages = found + self.pages.take(needed)
        sequence.computed, sequence.num_published = start, len(found)
        self.running.append(sequence)
        self._count_prompt(sequence, start)
        return True

    def _count_prompt(self, sequence: Sequence, start: int) -> None:
        """Records, once per request, how much of its prompt was cached when its first sample was admitted."""
        prompt = sequence.prompt
        if prompt.num_cached is None:
            prompt.num_cached, sequence.counts_prompt = start, True
            self.cached_tokens += start
            self.computed_tokens += len(prompt.tokens_T) - start

    def next_parts(self, budget: int, shapes: PrefillShapes) -> list[Part]:
        """What to prefill in the next call: `budget` tokens or a few more, in order of admission.

        A prompt waits while an earlier one in the call computes pages that both need, unless they are so few that
        computing them again is cheaper than another call.

        Raises:
            SequenceError: the page keys of a sequence could not be computed.
        """
        parts: list[Part] = []
        rows = longest = 0
        computing: set[Key] = set()
        for sequence in self.prefilling:
            room = shapes.most_rows(budget) - rows if parts else shapes.rows_of(budget)
            if room <= 0:
                break
            with failing_alone(sequence):
                keys = self._find_more(sequence)
            if sequence.decodes:
                continue
            start, page_size = sequence.computed, self.config.page_size
            needed = keys[start // page_size :]
            shared = next((i for i, key in enumerate(needed) if key not in computing), len(needed))
            if shared * page_size >= shapes.row_tokens:
                continue
            end = min(sequence.length - 1, start + min(room * shapes.row_tokens, self.config.prefill_tokens))
            new_rows, new_longest = rows + shapes.rows_of(end - start), max(longest, end)
            if parts and not shapes.fits(new_rows, new_longest):
                continue
            rows, longest = new_rows, new_longest
            parts.append(Part(sequence, start, end))
            computing.update(keys[start // page_size : end // page_size])
        return parts

    def _find_more(self, sequence: Sequence) -> list[Key]:
        """Replaces the pages that a sequence would compute next by equal ones that others have published since its
        admission; returns the keys of its full pages.
        """
        if not self.config.prefix_caching:
            return []
        page_size = self.config.page_size
        keys, first = sequence.extend_keys(sequence.length - 1, page_size), sequence.computed // page_size
        found = self.pages.find(keys[first:])
        if found:
            before, end = sequence.computed, first + len(found)
            self.pages.hold(found)
            self.pages.release(sequence.pages[first:end])
            sequence.pages = [*sequence.pages[:first], *found, *sequence.pages[end:]]
            sequence.num_published = end
            self.computed(sequence, end * page_size)
            if sequence.counts_prompt:
                assert sequence.prompt.num_cached is not None
                gained = sequence.computed - before
                sequence.prompt.num_cached += gained
                self.cached_tokens += gained
                self.computed_tokens -= gained
        return keys

    def computed(self, sequence: Sequence, end: int) -> None:
        """Notes that tokens up to `end` are in the cache: publishes full pages and releases features.

        Raises:
            SequenceError: the page keys could not be computed.
        """
        sequence.computed = end
        if self.config.prefix_caching and end // self.config.page_size > sequence.num_published:
            with failing_alone(sequence):
                keys = sequence.extend_keys(end, self.config.page_size)
            for page in range(sequence.num_published, len(keys)):
                self.pages.publish(sequence.pages[page], keys[page])
            sequence.num_published = len(keys)
        if sequence.decodes:
            self._release_views(sequence)
            if not sequence.followers:  # `fork` handles followers
                self._let_go(sequence)

    def fork(self) -> list[tuple[int, int]]:
        """Admits followers whose leader has computed the prompt, while there are slots and pages. The rest are queued
        ahead of later requests and look up the prompt's pages when admitted.

        Returns:
            Pages to copy, as (from, to): each prompt's last page, unless it is full.
        """
        copies, queued, page_size = [], [], self.config.page_size
        for leader in [sequence for sequence in self.running if sequence.followers and sequence.decodes]:
            size = leader.length - len(leader.generated) - 1  # tokens shared by all samples
            full, partial = divmod(size, page_size)
            for sequence in self._let_go(leader):
                if len(self.running) >= self.config.max_sequences or self.pages.num_free < 1 + len(self.running):
                    queued.append(sequence)
                    continue
                shared, own = leader.pages[:full], self.pages.take(1)
                self.pages.hold(shared)
                sequence.pages, sequence.computed = shared + own, size
                self._count_prompt(sequence, size)
                sequence.keys, sequence.num_published = leader.keys[:full], full
                self.running.append(sequence)
                if partial:
                    copies.append((leader.pages[full], own[0]))
        self.waiting.extendleft(reversed(queued))
        return copies

    def reserve(self, steps: int) -> list[Sequence]:
        """Allocates pages for `steps` more tokens of every decoding sequence, up to its limit.

        Returns:
            The sequences to decode now; preempted ones are excluded.
        """
        for sequence in list(self.running):
            while sequence.decodes:
                # The token at the limit is sampled but never fed back.
                last = min(sequence.length - 1 + steps, sequence.prompt.limit - 1)
                needed = -(-last // self.config.page_size) - len(sequence.pages)
                if needed <= 0 or sequence not in self.running:  # the check of the list takes long
                    break
                try:
                    sequence.pages += self.pages.take(needed)
                    break
                except OutOfPages:
                    self.preempt(self.running[-1])
        return self.decoding

    def preempt(self, sequence: Sequence) -> None:
        """Moves a running sequence back to the front of the queue. Its followers keep waiting."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence in any state. Its first follower replaces it as leader."""
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
            self.num_following -= 1
            return
        place = 0
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            place = self.waiting.index(sequence)
            self.waiting.remove(sequence)
        self._free(sequence)
        followers = self._let_go(sequence)
        if followers:
            leader, *others = followers
            self._leaders[leader.prompt.key] = leader
            self.waiting.insert(place, leader)
            self._follow(leader, others)

    def _follow(self, leader: Sequence, samples: list[Sequence]) -> None:
        for sequence in samples:
            sequence.leader = leader
        leader.followers += samples
        self.num_following += len(samples)

    def _let_go(self, leader: Sequence) -> list[Sequence]:
        """Detaches and returns the followers of a sequence."""
        if self._leaders.get(leader.prompt.key) is leader:
            del self._leaders[leader.prompt.key]
        followers, leader.followers = leader.followers, []
        for sequence in followers:
            sequence.leader = None
        self.num_following -= len(followers)
        return followers

    def _free(self, sequence: Sequence) -> None:
        self._release_views(sequence)
        self.pages.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.num_published = [], 0, 0
        sequence.counts_prompt = False

    def _release_views(self, sequence: Sequence) -> None:
        if sequence.views is not None:
            assert self.store is not None
            self.store.release(sequence.prompt.digests)
            sequence.views = None
