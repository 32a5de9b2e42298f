"""The engine: grid -> plan -> stack -> trainer -> store."""

import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
    # `python -m engine.sweep` puts the current folder first, and a random.py that lies there is the user's
    del sys.path[0]
