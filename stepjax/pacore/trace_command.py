"""`stepjax pacore trace`: pages of a batch run, one for each answer, and a table of them."""

import argparse
import hashlib
import html
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepjax.errors import CheckpointError, ConfigError
from stepjax.figures import human_number, human_time, printable
from stepjax.pacore.answers import extract
from stepjax.pacore.trace import fill, write_trace, write_whole
from stepjax.pacore.trace_run import TracedRun

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
    traced = TracedRun(directory)
    out = directory / "traces" if given.out is None else given.out.expanduser()
    wanted, entries = None if given.problem is None else set(given.problem), []
    for row in traced.rows():
        if wanted is not None and row["id"] not in wanted:
            continue
        try:
            of = traced.outcome(row)
        except CheckpointError as error:
            print(f"no page: {printable(error)}", file=sys.stderr)
            entries.append((row, None, None))
            continue
        name = page_name(row["id"], row["sample"])
        write_trace(
            of,
            out / name,
            title=row["id"] if not row["sample"] else f"{row['id']}, sample {row['sample']}",
            correct=row["correct"],
            matching="math" if traced.matching == "math" and row["ground_truth"] is not None else None,
            thoughts=not given.without_thoughts,
            notes=traced.notes(),
        )
        entries.append((row, name, of.seconds))
    missing = sorted((wanted or set()) - {row["id"] for row, _, _ in entries})
    if missing:
        raise ConfigError(f"--problem {missing[0]}: {directory} has no answer to a problem of that id")
    count = sum(name is not None for _, name, _ in entries)
    if wanted is None:
        write_whole(out / "index.html", index_html(entries, directory.resolve().name, traced))
        print(f"{count} pages, and a table of them in {out / 'index.html'}")
    else:
        print("\n".join(str(out / name) for _, name, _ in entries if name is not None))
    return 0


def page_name(problem: str, sample: int) -> str:
    """A file's name that no other problem has, also where capitals do not count."""
    plain = re.sub(r"[^a-z0-9._-]", "_", problem.lower()).lstrip("._-")[:60] or "problem"
    if plain != problem or plain == "index" or ".sample-" in plain:
        plain = f"{plain}-{hashlib.blake2b(problem.encode('utf-8', 'surrogatepass'), digest_size=5).hexdigest()}"
    return f"{plain}.html" if not sample else f"{plain}.sample-{sample}.html"


# The table.

_Entry = tuple[Mapping[str, Any], str | None, float | None]  # row, page, seconds


def index_html(entries: Sequence[_Entry], title: str, traced: TracedRun) -> str:
    summary = traced.summary
    facts = [("method", summary.get("method")), ("answers", len(entries))]
    scored = [row["correct"] for row, _, _ in entries if row["correct"] is not None]
    if scored:
        facts.append(("right", f"{sum(scored)} of {len(scored)}"))
    failed = sum(row["error"] is not None for row, _, _ in entries)
    facts += [
        ("failed", failed or None),
        ("calls", f"{sum(row['usage']['calls'] for row, _, _ in entries):,}"),
        ("output tokens (TTC)", f"{sum(row['usage']['output_tokens'] for row, _, _ in entries):,}"),
        ("lost tokens", f"{sum(row['usage']['lost_tokens'] for row, _, _ in entries):,}"),
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
            "rows": "\n".join(_row(entry, traced) for entry in entries),
        },
    )


def _row(entry: _Entry, traced: TracedRun) -> str:
    row, page, seconds = entry
    kind, verdict = {True: ("right", "right"), False: ("wrong", "wrong")}.get(row["correct"], ("", "not judged"))
    if row["error"] is not None:
        kind, verdict = "wrong", "failed"
    said = row["error"] or row["final_response"] or ""
    if row["error"] is None and row["ground_truth"] is not None:
        said = extract(said, traced.matching)
    name = f"{row['id']}, sample {row['sample']}" if row["sample"] else row["id"]
    shown = html.escape(name) if page is None else f'<a href="{html.escape(page)}">{html.escape(name)}</a>'
    truth = "" if row["ground_truth"] is None else html.escape(_short(str(row["ground_truth"])))
    cells = [
        f'<th scope="row" class="short">{shown}</th>',
        f'<td><span class="pill {kind}">{verdict}</span></td>',
        f'<td class="short">{html.escape(_short(said))}</td>',
        f'<td class="short">{truth}</td>',
        f"<td>{html.escape(row['answered_by'] or '')}</td>",
        f'<td class="number">{row["usage"]["calls"]}</td>',
        f'<td class="number">{human_number(row["usage"]["output_tokens"])}</td>',
        f'<td class="number">{"" if seconds is None else human_time(seconds)}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."
