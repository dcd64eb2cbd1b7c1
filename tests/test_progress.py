"""The progress display: in place on a terminal, by lines elsewhere, safe for threads and for foreign text."""

import io
import threading

import pytest

from stepjax import progress as module
from stepjax.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_in_place_and_messages_on_lines_of_their_own():
    with progress(20e9, unit="B", description="converting", done=10e9, stream=(terminal := Terminal())) as bar:
        bar.print("skipped \x1b[2J")
        bar.update(5e9, note="loss 2.3")
    shown = terminal.getvalue()
    assert "\rconverting:  50%|" in shown and "10.0G/20.0G" in shown
    assert "skipped \\x1b[2J\n" in shown
    assert shown.endswith("\n") and "converting:  75%" in shown.splitlines()[-1] and "loss 2.3" in shown
    assert shown.count("\n") == 2


def test_a_log_gets_lines_at_an_interval(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1e-9)
    with progress(4, description="answers", stream=(log := io.StringIO())) as bar:
        bar.update(2, note="1 right")
        bar.print("a message")
        bar.write("logged", file=bar.fp)  # as logging does
        bar.update(0, note="2 right")
    assert "\r" not in log.getvalue()
    first, message, logged, second = log.getvalue().splitlines()
    assert first.startswith("answers:  50%  2/4 [") and first.endswith("1 right]")
    assert (message, logged) == ("a message", "logged") and second.endswith("2 right]")


def test_a_log_hears_nothing_of_what_is_done_within_the_interval():
    with progress(2, stream=(log := io.StringIO())) as bar:
        bar.update()
        bar.print("a message")
    assert log.getvalue() == "a message\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_other_processes_only_print(stream):
    with progress(2, shown=False, stream=(out := stream())) as bar:
        bar.update(2)
        bar.print("skipped record 7")
    assert out.getvalue() == "skipped record 7\n"


def test_threads_lose_no_update():
    with progress(None, stream=io.StringIO()) as bar:
        threads = [threading.Thread(target=lambda: [bar.update() for _ in range(2000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bar.n == 8000
