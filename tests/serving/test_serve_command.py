"""`stepjax serve` up to the point where it listens."""

import socket

import pytest

from stepjax.cli import USAGE, main
from stepjax.errors import ConfigError
from stepjax.interop.engines import EngineArguments
from stepjax.serving.command import ServeArguments
from stepjax.serving.settings import Limits, ServerSettings


def test_usage_and_help(capsys):
    assert "serve MODEL" in USAGE
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    for option in ("--engine.max-sequences", "--limits.body-bytes", "--allow-remote-images", "--drain-seconds"):
        assert option in shown


def test_keys_come_from_the_command_line_and_the_environment():
    settings = ServeArguments("runs/tiny/", api_keys=("a",)).settings("b, c,")
    assert settings.api_keys == ("a", "b", "c") and settings.model_name == "tiny" and not settings.hosts
    assert "'a'" not in repr(settings)
    assert "localhost" in ServeArguments("m").settings(None).hosts
    assert not ServeArguments("m", host="0.0.0.0").settings(None).hosts


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: ServeArguments("m", port=70_000), "--port 70000"),
        (lambda: ServeArguments("m", drain_seconds=-1), "--drain-seconds -1"),
        (lambda: ServeArguments("m", local=EngineArguments(tensor_parallel=0)), "--tensor-parallel 0"),
        (lambda: Limits(images=0), "limits.images=0"),
        (lambda: ServerSettings(model_name=""), "model_name=''"),
        (lambda: ServerSettings(model_name="m", api_keys=("",)), "API key"),
        (lambda: ServerSettings(model_name="m", workers=0), "workers=0"),
    ],
)
def test_values_that_cannot_work_are_named(make, part):
    with pytest.raises(ConfigError, match=part):
        make()


def test_mistakes_are_one_line(capsys, tmp_path):
    assert main(["serve", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("stepjax serve: ")


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "nothing", "--port", port]) == 1
    assert f"--port {port}: Address already in use" in capsys.readouterr().err
    assert main(["serve", "nothing", "--host", "nowhere.invalid"]) == 1
    assert "--host nowhere.invalid" in capsys.readouterr().err
