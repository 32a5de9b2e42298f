"""What a script imports first, from its own folder: says how to start it where its packages are not installed.

And takes that folder from where modules are looked for, so that a file of it hides no package of its name: `evaluate`
is one that lm-evaluation-harness imports. Standard library only.
"""

import sys
from importlib.util import find_spec
from os.path import abspath, dirname, relpath

if sys.version_info < (3, 11) or any(find_spec(name) is None for name in ("engine", "numpy", "simple_parsing", "rich")):
    script = relpath(str(sys.modules["__main__"].__file__))
    sys.stderr.write(
        f"error: Python {sys.version.split()[0]} has not what {script} needs; start it by `uv run {script}`, "
        f"or once `make setup` and then `.venv/bin/python {script}`\n"
    )
    sys.exit(2)

if started := getattr(sys.modules["__main__"], "__file__", None):  # none where it is imported by a line of code
    sys.path[:] = [path for path in sys.path if abspath(path) != dirname(abspath(started))]
