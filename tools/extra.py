"""Print the requirements of one of the package's extras, for an environment that does not hold the package."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sys.stdout.write("\n".join(project["optional-dependencies"][sys.argv[1]]) + "\n")
