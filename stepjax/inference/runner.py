"""The device side of the engine: weights, cache and features, and calls of the programs with fixed shapes.

Legend: E views, Q features of a view, X pages to copy.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stepjax.config import ImageConfig
from stepjax.errors import ConfigError, RequestError
from stepjax.inference import programs
from stepjax.inference.batch import Batch, PrefixGroup, group_by_prefix, make_batch
from stepjax.inference.buckets import bucket, sizes
from stepjax.inference.config import EngineConfig
from stepjax.inference.feature_store import VIEW_KINDS, ViewFeatures, ViewKind, ViewShape
from stepjax.inference.prefill import Part, PrefillArrays, PrefillShapes
from stepjax.inference.request import MAX_TOP_LOGPROBS
from stepjax.inference.sequence import Sequence
from stepjax.models.paged_cache import NO_PAGE, make_pool, pool_layout
from stepjax.models.qwen3 import Qwen3
from stepjax.models.serving_decoder import serving_model
from stepjax.models.step_vl import StepVL
from stepjax.sharding import check_heads_only, parameter_name, shardings, spec, target_platform


class Runner:
    """
    Raises:
        ConfigError: the mesh has axes besides the tensor axis, or does not divide the model.
    """

    def __init__(
        self,
        model: StepVL | Qwen3,
        config: EngineConfig,
        images: ImageConfig | None,
        *,
        max_context: int,
        num_pages: int,
        mesh: Mesh | None,
        donate: bool,
    ):
        self.config, self.images, self.mesh = config, images, mesh
        self.decoder_config = decoder = programs.decoder_of(model).config
        if mesh is not None:
            check_heads_only(mesh)
        self._expected = jax.eval_shape(lambda: model)
        self._take(model, donate)
        self._grouped: tuple[list[list[int]], list[PrefixGroup]] = [], []  # page lists and their groups
        self.row_pages = -(-max_context // config.page_size)
        self.batch_sizes = sizes(config.smallest_batch, config.max_sequences, 4)
        self.feature_rows = 0 if images is None else config.feature_cache_tokens
        self.view_shapes: dict[ViewKind, ViewShape] = {}
        if images is not None:
            assert isinstance(model, StepVL)
            for kind in VIEW_KINDS[: 2 if model.config.tofc is None else 4]:
                self.view_shapes[kind] = ViewShape.of(kind, model.config, images, config)
        with self._scope():
            platform = target_platform()
            # XLA visits only the pages in use; for the kernel, a prompt's pages are copied up to the table's length.
            self.prefill_shapes = PrefillShapes(config, self.row_pages, reads_whole_rows=platform == "tpu")
            dtype = jnp.dtype(programs.decoder_of(model).numerics.compute_dtype)
            if decoder.num_kv_heads * config.page_size * num_pages == 0:
                raise ConfigError(f"engine.cache_tokens={config.cache_tokens}: must hold at least one page")
            layout = None if mesh is None else pool_layout(mesh)
            self.pool_S2KTW = make_pool(decoder, num_pages, config.page_size, dtype, platform, layout)
            replicated = None if mesh is None else NamedSharding(mesh, spec())
            self.features_RD = jnp.zeros((max(self.feature_rows, 1), decoder.width), dtype, device=replicated)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies pages, given as (from, to) pairs."""
        width = self.config.max_sequences
        for first in range(0, max(len(pairs), 1), width):
            some = np.array(pairs[first : first + width], np.int32).reshape(-1, 2)
            source_X, target_X = np.zeros(width, np.int32), np.full(width, NO_PAGE, np.int32)
            source_X[: len(some)], target_X[: len(some)] = some.T
            with self._scope():
                self.pool_S2KTW = programs.copy(
                    self.pool_S2KTW, source_X, target_X, num_layers=self.decoder_config.num_layers
                )

    def prefill(self, parts: list[Part]) -> int:
        """Prefills parts of prompts in one call; returns how many tokens the device computed, padding included.

        Raises:
            SequenceError: the rows of a sequence could not be built.
        """
        arrays = self.prefill_shapes.arrays(parts)
        self._prefill(arrays)
        return arrays.size

    def _prefill(self, arrays: PrefillArrays) -> None:
        with self._scope():
            self.pool_S2KTW = programs.prefill(self._weights, self.pool_S2KTW, self.features_RD, *arrays)

    @property
    def most_views(self) -> dict[ViewKind, int]:
        """Views per encoder call."""
        return {kind: shape.batch_sizes[-1] for kind, shape in self.view_shapes.items()}

    def encode(self, kind: ViewKind, views: list[tuple[ViewFeatures, np.ndarray]]) -> float:
        """Encodes up to `most_views` views of one kind; returns the cost, padding included, in prompt tokens of equal
        FLOPs.
        """
        views_EX, rows_EQ = self.view_shapes[kind].batch(views, self.feature_rows)
        self._encode(views_EX, rows_EQ)
        return len(views_EX) * self.view_shapes[kind].cost

    def _encode(self, views_EX: np.ndarray, rows_EQ: np.ndarray) -> None:
        with self._scope():
            self.features_RD = programs.encode(self._weights, self.features_RD, views_EX, rows_EQ)

    def decode(self, sequences: list[Sequence]) -> programs.Drawn:
        """The next tokens of all sequences, on the host; row i belongs to sequence i.

        Raises:
            SequenceError: a row could not be built.
        """
        batch = make_batch(
            sequences,
            self._groups_of(sequences),
            num_rows=bucket(len(sequences), self.batch_sizes),
            row_pages=self.row_pages,
            page_size=self.config.page_size,
            max_prefix_groups=self.config.max_prefix_groups,
        )
        return jax.device_get(self._decode(batch))

    def _groups_of(self, sequences: list[Sequence]) -> list[PrefixGroup]:
        """The prefix groups, recomputed only when a sequence comes or goes: the pages it fills while decoding are its
        own. Every admission creates a new page list.
        """
        of_rows = [sequence.pages for sequence in sequences]
        before, groups = self._grouped
        if len(of_rows) != len(before) or any(a is not b for a, b in zip(of_rows, before, strict=True)):
            full = [sequence.pages[: sequence.computed // self.config.page_size] for sequence in sequences]
            groups = group_by_prefix(full, self.config.max_prefix_groups)
            self._grouped = of_rows, groups
        return groups

    def _decode(self, batch: Batch) -> programs.Drawn:
        with self._scope():
            self.pool_S2KTW, drawn = programs.decode(
                self._weights,
                self.pool_S2KTW,
                batch.tables,
                batch.rows,
                steps=self.config.decode_steps,
                num_top=batch.num_top,
            )
        return drawn

    def warm_up(self, top_logprobs: bool) -> Iterator[str]:
        """Calls every program in every shape, on empty arrays; yields the name of the next one."""
        yield "page copies"
        self.copy([])
        for rows, tokens, width in self.prefill_shapes:
            yield f"prefill of {rows} x {tokens} tokens"
            self._prefill(PrefillArrays.empty(rows, tokens, width))
        for kind, shape in self.view_shapes.items():
            for size in shape.batch_sizes:
                yield f"encoder, {size} {kind} views"
                self._encode(*shape.empty(size, self.feature_rows))
        for rows in self.batch_sizes:
            for groups in sorted({1, self.config.max_prefix_groups}) if rows > 1 else (1,):
                for num_top in (0, MAX_TOP_LOGPROBS) if top_logprobs else (0,):
                    yield f"decoding of {rows} rows, {groups} prefix groups, {num_top} top log-probabilities"
                    self._decode(Batch.empty(rows, groups, self.row_pages, num_top))
        jax.block_until_ready(self.pool_S2KTW)

    def set_weights(self, model: StepVL | Qwen3) -> None:
        """
        Raises:
            RequestError: the structure, a shape or a dtype differs; names the first difference.
        """
        if model is self.model:
            return
        expected = self._expected
        old, new = (jax.tree_util.tree_leaves_with_path(m) for m in (expected, model))
        for (path, a), (_, b) in zip(old, new, strict=False):
            if a.shape != b.shape or a.dtype != b.dtype:
                name = parameter_name(path)
                raise RequestError(f"weights: {name} is {b.dtype}{b.shape}, the engine has {a.dtype}{a.shape}")
        if jax.tree.structure(expected) != jax.tree.structure(model):
            raise RequestError("weights: the model's structure differs from the engine's")
        del self.model, self._weights  # before the new ones are made
        self._take(model, donate=False)

    def _take(self, model: StepVL | Qwen3, donate: bool) -> None:
        if self.mesh is not None:
            model = jax.device_put(model, shardings(model, self.mesh))
        with self._scope():
            self.model = serving_model(model, self.config.weights, donate=donate)
        self._weights = programs.Packed.of(self.model)

    def _scope(self) -> AbstractContextManager:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
