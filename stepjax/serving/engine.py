"""What the server needs of an engine: the one protocol, by the name that the server uses."""

from stepjax.inference.request import EngineClient as AsyncEngine

__all__ = ["AsyncEngine"]
