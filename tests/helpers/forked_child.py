"""A process of ``forked``, which runs this file with the global ``PROGRAM``; it ends as one of ``python -c`` does."""

from __future__ import annotations

import os
import sys
from typing import Any


def main(program: dict[str, Any]) -> None:
    """Run the program's code in its folder and environment."""
    for path, descriptor in ((program["out"], 1), (program["err"], 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["cwd"])
    sys.argv = program["argv"]
    import torch

    torch.set_num_threads(1)
    exec(compile(program["code"], "<forked>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(globals()["PROGRAM"])
