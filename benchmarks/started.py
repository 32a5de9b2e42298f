"""What a script of this folder imports first: engine/started.py, which says how to start it."""

import runpy
from os.path import abspath, dirname, join

runpy.run_path(join(dirname(dirname(abspath(__file__))), "engine", "started.py"))
