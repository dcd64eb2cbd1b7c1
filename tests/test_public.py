"""The public surface: every name of `stepjax.__all__` is there, is documented, and loads only what it needs."""

import ast
import inspect
import subprocess
import sys

import pytest

import stepjax


@pytest.mark.parametrize("name", stepjax.__all__)
def test_a_public_name_is_the_documented_object_of_its_module(name):
    value = getattr(stepjax, name)
    assert value.__module__ == f"stepjax.{stepjax._PLACES[name]}" and value.__name__ == name
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), "a docstring of its own"


def test_type_checkers_see_the_same_names():
    tree = ast.parse(inspect.getsource(stepjax))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert seen == {name: f"stepjax.{place}" for name, place in stepjax._PLACES.items()}
    assert sorted(seen) == sorted(stepjax.__all__) and set(stepjax.__all__) <= set(dir(stepjax))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'stepjax' has no attribute 'Engin'"):
        stepjax.Engin  # noqa: B018


def test_configurations_load_no_jax():
    program = "import sys, stepjax; stepjax.PretrainConfig, stepjax.EngineConfig, stepjax.SamplingParams, "
    program += "stepjax.PacoreConfig, stepjax.load_recipe; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
