"""`stepjax pacore trace`: pages of a batch run, one for each answer, and a table of them."""

import argparse
import dataclasses
import hashlib
import html
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepjax.errors import CheckpointError, ConfigError
from stepjax.figures import human_number, human_time
from stepjax.pacore.answers import Matching, extract
from stepjax.pacore.batch import SUMMARY
from stepjax.pacore.journal import outcomes
from stepjax.pacore.records import Outcome, Totals
from stepjax.pacore.trace import fill, write_trace, write_whole

_DESCRIPTION = """Make a page of every answer of a run: rounds, trajectories, references, tokens and time.

DIR is the --out of `stepjax pacore run`, which may still be going on. Pages need no server and no network."""


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 well, 2 bad usage.

    Raises:
        CheckpointError: the directory is not that of a run, or a page cannot be written.
        ConfigError: no problem of the run has an id that was asked for.
    """
    parser = _parser()
    if not arguments:
        parser.print_usage(sys.stderr)
        return 2
    try:
        given = parser.parse_args(list(arguments))
    except SystemExit as error:  # the message is printed
        return error.code if isinstance(error.code, int) else 2
    try:
        return _write(given)
    except OSError as error:
        raise CheckpointError(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepjax pacore trace", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--problem", metavar="ID", action="append", help="this problem alone; may be given again for another one"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="where pages go (default: DIR/traces)")
    parser.add_argument("--without-thoughts", action="store_true", help="smaller pages: messages alone")
    return parser


def _write(given: argparse.Namespace) -> int:
    directory = given.directory.expanduser()
    summary = _summary(directory)
    matching = summary.get("matching", "math")
    out = directory / "traces" if given.out is None else given.out.expanduser()
    wanted, entries = None if given.problem is None else set(given.problem), []
    for of in outcomes(directory):
        problem = of.problem
        if wanted is not None and problem.id not in wanted:
            continue
        name = page_name(problem.id, of.sample)
        write_trace(
            of,
            out / name,
            title=problem.id if not of.sample else f"{problem.id}, sample {of.sample}",
            correct=of.correct,
            matching="math" if matching == "math" and problem.ground_truth is not None else None,
            thoughts=not given.without_thoughts,
        )
        entries.append((dataclasses.replace(of, rounds=()), of.totals, of.content, name))
    missing = sorted((wanted or set()) - {of.problem.id for of, *_ in entries})
    if missing:
        raise ConfigError(f"--problem {missing[0]}: {directory} has no answer to a problem of that id")
    if wanted is None:
        write_whole(out / "index.html", index_html(entries, directory.resolve().name, summary.get("method"), matching))
        print(f"{len(entries)} pages, and a table of them in {out / 'index.html'}")
    else:
        print("\n".join(str(out / name) for *_, name in entries))
    return 0


def _summary(directory: Path) -> dict[str, Any]:
    path = directory / SUMMARY
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def page_name(problem: str, sample: int) -> str:
    """A file's name that no other problem has, also where capitals do not count."""
    plain = re.sub(r"[^a-z0-9._-]", "_", problem.lower()).lstrip("._-")[:60] or "problem"
    if plain != problem or plain == "index" or ".sample-" in plain:
        plain = f"{plain}-{hashlib.blake2b(problem.encode('utf-8', 'surrogatepass'), digest_size=5).hexdigest()}"
    return f"{plain}.html" if not sample else f"{plain}.sample-{sample}.html"


# The table.

_Entry = tuple[Outcome, Totals, str, str]  # without its rounds, their totals, the answer, the page


def index_html(entries: Sequence[_Entry], title: str, method: str | None, matching: Matching) -> str:
    facts = [("method", method), ("answers", len(entries))]
    scored = [of.correct for of, *_ in entries if of.correct is not None]
    if scored:
        facts.append(("right", f"{sum(scored)} of {len(scored)}"))
    facts += [
        ("failed", sum(of.error is not None for of, *_ in entries) or None),
        ("calls", f"{sum(totals.calls for _, totals, *_ in entries):,}"),
        ("output tokens (TTC)", f"{sum(totals.output_tokens for _, totals, *_ in entries):,}"),
        ("lost tokens", f"{sum(totals.lost_tokens for _, totals, *_ in entries):,}"),
    ]
    return fill(
        "index.html",
        {
            "title": html.escape(title),
            "facts": "".join(
                f"<div><dt>{name}</dt><dd>{html.escape(str(value))}</dd></div>"
                for name, value in facts
                if value is not None
            ),
            "rows": "\n".join(_row(entry, matching) for entry in entries),
        },
    )


def _row(entry: _Entry, matching: Matching) -> str:
    of, totals, said, page = entry
    problem = of.problem
    kind, verdict = {True: ("right", "right"), False: ("wrong", "wrong"), None: ("", "not judged")}[of.correct]
    if of.error is not None:
        kind, verdict, said = "wrong", "failed", of.error
    elif problem.ground_truth is not None:
        said = extract(said, matching)
    name = f"{problem.id}, sample {of.sample}" if of.sample else problem.id
    truth = "" if problem.ground_truth is None else html.escape(_short(str(problem.ground_truth)))
    cells = [
        f'<th scope="row" class="short"><a href="{html.escape(page)}">{html.escape(name)}</a></th>',
        f'<td><span class="pill {kind}">{verdict}</span></td>',
        f'<td class="short">{html.escape(_short(said))}</td>',
        f'<td class="short">{truth}</td>',
        f"<td>{html.escape(of.answered_by or '')}</td>",
        f'<td class="number">{totals.calls}</td>',
        f'<td class="number">{human_number(totals.output_tokens)}</td>',
        f'<td class="number">{human_time(of.seconds)}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."
