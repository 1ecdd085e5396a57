"""A process of ``forked``, which runs this file with the globals below; it ends as one of ``python -c`` does."""

from __future__ import annotations

import os
import sys

CODE: str
ARGV: list[str]
CWD: str
ENVIRONMENT: dict[str, str]
OUT: str
ERR: str

if __name__ == "__main__":
    for path, descriptor in ((OUT, 1), (ERR, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    os.chdir(CWD)
    sys.argv = ARGV
    import torch

    torch.set_num_threads(1)
    exec(compile(CODE, "<forked>", "exec"), {"__name__": "__main__"})
