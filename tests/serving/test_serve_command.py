"""`stepjax serve` up to the point where it listens."""

import socket

import pytest

from stepjax.cli import main
from stepjax.errors import ConfigError
from stepjax.interop.engines import EngineArguments
from stepjax.serving.command import Serve
from stepjax.serving.settings import Limits, ServerSettings


@pytest.mark.parametrize(
    "verb, options",
    [
        ("serve", ("--engine.max-sequences", "--limits.body-bytes", "--allow-remote-images", "--pacore.schedule")),
        ("pacore serve", ("--upstream.url", "--limits.body-bytes", "--drain-seconds", "--schedule", "--quorum")),
    ],
)
def test_help_lists_the_options(capsys, verb, options):
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in options)


def test_keys_come_from_the_command_line_and_the_environment():
    settings = ServerSettings(api_keys=("a",)).completed(environment="b, c,", model_name="tiny")
    assert settings.api_keys == ("a", "b", "c") and settings.model_name == "tiny" and not settings.hosts
    assert "'a'" not in repr(settings)
    assert "localhost" in ServerSettings().completed(environment=None).hosts
    assert not ServerSettings(host="0.0.0.0").completed(environment=None).hosts
    assert ServerSettings(hosts=("mine",)).completed(environment=None).hosts == ("mine",)


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: ServerSettings(port=70_000), "--port 70000"),
        (lambda: ServerSettings(drain_seconds=-1), "--drain-seconds -1"),
        (lambda: Serve(model="m", local=EngineArguments(tensor_parallel=0)).run(), "--tensor-parallel 0"),
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
