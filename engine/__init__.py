"""The engine: grid -> plan -> scheduler -> step -> store. In a notebook: `from engine import sweep, open_store`."""

import os
import sys
from importlib import import_module
from types import ModuleType

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
    # `python -m engine.sweep` puts the current folder first, and a random.py that lies there is the user's
    del sys.path[0]

PUBLIC = {"sweep": "engine.api", "open_store": "engine.store", "load_model": "engine.checkpoint"}


def public(name: str) -> property:
    """A function of another module, imported when it is asked for; importing a module of that name leaves it alone."""
    return property(lambda package: getattr(import_module(PUBLIC[name]), name), lambda package, module: None)


# `import engine.sweep` binds the module to the package's name `sweep`, which is the function's
Engine = type("Engine", (ModuleType,), {name: public(name) for name in PUBLIC})
sys.modules[__name__].__class__ = Engine
