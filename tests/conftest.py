"""Makes the tests import this repository, whatever folder they are started in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
