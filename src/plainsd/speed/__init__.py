"""Faster, and the same but for rounding (part V): functions over a loaded model.

The plain forward passes in models/ are the specification and do not depend on this folder. What changes a picture by
more than rounding says so (int8.py). Each function has an equality test and a row in `plainsd bench`.
"""

from importlib import import_module

_HOME = {
    "faster": "model",
    "pack": "model",
    "plain_again": "model",
    "compile_unet": "model",
    "trained_faster": "training",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'plainsd.speed' has no attribute {name!r}")
    return getattr(import_module(f"plainsd.speed.{_HOME[name]}"), name)
