"""Which pages hold whose keys and values: the arrays a decoding step is addressed by, and their checks on the host.

A step decodes one token for each of B trajectories. Trajectories of one problem share the problem's prefix; each has a
suffix of its own. Both lie in pages of one pool, so a prefix that was written in one piece is simply a row of
consecutive page numbers. A suffix starts on a fresh page, wherever the prefix ended in its last one.

    problem 0    prefix pages 7 8 9 (130 tokens)    trajectory 0    suffix pages 3 4 (70 tokens)
                                                    trajectory 2    suffix page  5   (12 tokens)
    no problem                                      trajectory 1    suffix pages 1 2 (99 tokens)

Axes: B trajectories, P problems, M pages in a row of a table (prefix and suffix rows may differ in width).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.checks import ArgumentError, check


class PageTables(NamedTuple):
    """The addresses of one decoding step; int32 arrays, a pytree. Only their shapes are compiled into the program.

    A trajectory's row is unused when `problem_of_B` names no problem and its suffix is empty: it then costs nothing.
    """

    prefix_pages_PM: Any  # page numbers of each problem's prefix; entries past its length are not read
    prefix_lengths_P: Any  # tokens of each prefix; 0: none
    problem_of_B: Any  # the problem of each trajectory, in any order; -1, or any value outside [0, P): none
    suffix_pages_BM: Any  # page numbers of each trajectory's own tokens
    suffix_lengths_B: Any  # tokens of each suffix, the one just written included; 0: none


@dataclasses.dataclass(frozen=True)
class PagedTokens:
    """A run of tokens: the pages that hold it, in order, and its length. The last page may be partly filled."""

    pages: Sequence[int] = ()
    length: int = 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prefix and the trajectories that continue it. A sequence that shares nothing: no prefix, one trajectory."""

    trajectories: Sequence[PagedTokens]
    prefix: PagedTokens = PagedTokens()


def pack_tables(
    problems: Sequence[Problem],
    *,
    page_size: int,
    num_pages: int,
    max_trajectories: int,
    max_problems: int,
    max_prefix_pages: int,
    max_suffix_pages: int,
) -> PageTables:
    """The tables of a step, as numpy arrays of the fixed shapes that the four maxima give.

    Trajectories take rows in the order given, problem after problem. Problems without a prefix take no row of P.

    Raises:
      ArgumentError: more of anything than its maximum, a page outside the pool, or fewer pages than a length needs. The
        message names the problem and the trajectory.
    """
    tables = PageTables(
        prefix_pages_PM=np.zeros((max_problems, max_prefix_pages), np.int32),
        prefix_lengths_P=np.zeros(max_problems, np.int32),
        problem_of_B=np.full(max_trajectories, -1, np.int32),
        suffix_pages_BM=np.zeros((max_trajectories, max_suffix_pages), np.int32),
        suffix_lengths_B=np.zeros(max_trajectories, np.int32),
    )
    total = sum(len(problem.trajectories) for problem in problems)
    check(
        total <= max_trajectories,
        f"problems have {total} trajectories; at most max_trajectories={max_trajectories} fit in a step",
    )
    shared = sum(problem.prefix.length > 0 for problem in problems)
    check(shared <= max_problems, f"{shared} problems have a prefix; at most max_problems={max_problems} fit in a step")

    row = prefix_row = 0
    for i, problem in enumerate(problems):
        name = f"problems[{i}].prefix"
        _fill(name, problem.prefix, tables.prefix_pages_PM, prefix_row, page_size, num_pages)
        problem_row = -1
        if problem.prefix.length > 0:
            tables.prefix_lengths_P[prefix_row] = problem.prefix.length
            problem_row = prefix_row
            prefix_row += 1
        for j, suffix in enumerate(problem.trajectories):
            name = f"problems[{i}].trajectories[{j}]"
            _fill(name, suffix, tables.suffix_pages_BM, row, page_size, num_pages)
            tables.problem_of_B[row] = problem_row
            tables.suffix_lengths_B[row] = suffix.length
            row += 1
    return tables


def _fill(name: str, tokens: PagedTokens, pages_XM: np.ndarray, row: int, page_size: int, num_pages: int) -> None:
    check(tokens.length >= 0, f"{name}.length is {tokens.length}; it cannot be negative")
    needed = -(-tokens.length // page_size)
    if needed == 0:
        return
    check(
        len(tokens.pages) >= needed,
        f"{name} has {len(tokens.pages)} pages of {page_size}; its length {tokens.length} needs {needed}",
    )
    width = pages_XM.shape[1]
    check(needed <= width, f"{name} needs {needed} pages; a row of its table holds {width}")
    for k, page in enumerate(tokens.pages[:needed]):
        check(0 <= page < num_pages, f"{name}.pages[{k}] is {page}; the pool has pages 0 to {num_pages - 1}")
    pages_XM[row, :needed] = tokens.pages[:needed]


def check_tables(tables: PageTables, *, page_size: int, num_pages: int) -> None:
    """Refuse tables that address what is not there; for concrete arrays, on the host, before a step or in a test.

    The kernels cannot look at values while they are traced. Given bad ones they stay inside the pool: page numbers are
    clamped into it and lengths to what a row holds, so the result of that trajectory is wrong and nothing else is.

    Raises:
      ArgumentError: naming the first entry that is out of range.
    """
    prefix_pages_PM, prefix_lengths_P, problem_of_B, suffix_pages_BM, suffix_lengths_B = map(np.asarray, tables)
    num_problems = len(prefix_lengths_P)
    _check_rows("prefix", "P", prefix_pages_PM, prefix_lengths_P, page_size, num_pages)
    _check_rows("suffix", "B", suffix_pages_BM, suffix_lengths_B, page_size, num_pages)
    for b in np.flatnonzero((problem_of_B < -1) | (problem_of_B >= num_problems)):
        raise ArgumentError(
            f"problem_of_B[{b}] is {problem_of_B[b]}; give a problem from 0 to {num_problems - 1}, or -1 for none"
        )


def _check_rows(
    kind: str, axis: str, pages_XM: np.ndarray, lengths_X: np.ndarray, page_size: int, num_pages: int
) -> None:
    rows, width = pages_XM.shape
    for x in np.flatnonzero((lengths_X < 0) | (lengths_X > width * page_size)):
        raise ArgumentError(
            f"{kind}_lengths_{axis}[{x}] is {lengths_X[x]}; a row of {width} pages holds 0 to "
            f"{width * page_size} tokens"
        )
    used = np.arange(width) < -(-lengths_X[:, None] // page_size)
    for x, m in np.argwhere(used & ((pages_XM < 0) | (pages_XM >= num_pages))):
        raise ArgumentError(
            f"{kind}_pages_{axis}M[{x}, {m}] is {pages_XM[x, m]}; the pool has pages 0 to {num_pages - 1}"
        )
