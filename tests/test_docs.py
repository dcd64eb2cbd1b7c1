"""What the documents say is there: links, files, and commands whose options exist."""

import re
import shlex
from pathlib import Path

import pytest

from stepjax import cli

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `stepjax ...` line in a block of code, continuation lines joined."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```(?:sh|bash|shell)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        blocks += re.findall(r"(?:^    \S.*\n)+", page.read_text(), re.MULTILINE)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            found += [(page.name, part.strip()) for part in line.split("&&")]
    pattern = re.compile(r"(?:\.venv/bin/|python -m )?stepjax(?:\.cli)? (?P<rest>.*)")
    matches = [(page, pattern.match(part)) for page, part in found]
    made = [(page, re.split(r"\s#", match["rest"])[0].strip()) for page, match in matches if match]
    return [each for each in made if not re.search(r"\.\.\.|RECIPE|--help|best\.py", each[1])]  # patterns of commands


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name} links to {target}"


def test_the_architecture_page_names_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:stepjax|pallas_kernels|configs|launch|benchmarks|tests|docs)/[\w./-]+)`", text)
    assert len(named) > 40
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page, command", commands(), ids=lambda value: value[:60])
def test_documented_commands_parse(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    verb = next(name for name in (" ".join(words[:2]), words[0]) if name in cli.VERBS)
    cli._parse(verb, words[len(verb.split()) :])
