"""All of a release but the upload: check versions, build, check the files, install into an empty environment, try it.

Run by ``make release`` in an environment with the extra ``release``. Nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORT_SECONDS = 0.3
"""Longest time that ``import semantic_routing`` may take, beyond the interpreter's own start."""
IN_WHEEL = (
    "py.typed",
    "model/kernels/mix_cpu.c",
    "model/kernels/mix_amx.c",
    "common/webpage.css",
    "analysis/page.js",
    "explorer/page.css",
    "explorer/heatmap.js",
)
"""Files besides modules that an installed package needs."""
IN_SDIST = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "constraints.txt", "pyproject.toml")


class NotReady(Exception):
    """A reason not to release, in one line."""


def version(root: Path = ROOT) -> str:
    """Return the package's version from its one place."""
    text = (root / "src/semantic_routing/__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def check_versions(root: Path = ROOT, *, rehearse: bool = False) -> None:
    """Raise NotReady unless changelog and citation are of this version, and the changelog gives its date."""
    here = version(root)
    cited = re.findall(r"^version: (.+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited != [here]:
        raise NotReady(f"CITATION.cff has version {' '.join(cited)}, the package {here}: write the package's")
    heading = re.findall(r"^## (\S+) \((.+)\)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    if heading[0] != here:
        raise NotReady(f"CHANGELOG.md begins with version {heading[0]}, the package is {here}: add its changes")
    if not rehearse and not re.fullmatch(r"\d{4}-\d\d-\d\d", heading[1]):
        raise NotReady(f"CHANGELOG.md says ({heading[1]}) of version {here}: write the date, or use --rehearse")


def check_tree(root: Path = ROOT) -> None:
    """Raise NotReady if files differ from the commit, which would be the released one."""
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, check=True, capture_output=True, text=True)
    if changed.stdout:
        raise NotReady(f"not committed: {', '.join(changed.stdout.split()[1::2])}; commit it, or use --rehearse")


def build(out: Path) -> tuple[Path, Path]:
    """Build both files into an empty folder and return them; twine checks their metadata."""
    run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist))
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Raise NotReady if a file is missing, or the wheel has a package besides ours."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    missing = [name for name in IN_WHEEL if f"semantic_routing/{name}" not in names]
    with tarfile.open(sdist) as opened_tar:
        packed = {name.partition("/")[2] for name in opened_tar.getnames()}
    missing += [name for name in IN_SDIST if name not in packed]
    if missing:
        raise NotReady(f"{wheel.name} or {sdist.name} lacks {', '.join(missing)}")
    ours = {"semantic_routing", f"semantic_routing-{version()}.dist-info"}
    foreign = {name.partition("/")[0] for name in names} - ours
    if foreign:
        raise NotReady(f"{wheel.name} also holds {', '.join(sorted(foreign))}")


def import_seconds(python: Path) -> float:
    """Return the least time of five imports of the package, each in a new process."""
    code = "import time; t = time.perf_counter(); import semantic_routing; print(time.perf_counter() - t)"
    return min(float(run(str(python), "-I", "-c", code)) for _ in range(5))


def try_alone(wheel: Path, home: Path) -> None:
    """Install the wheel without its dependencies: importing it needs none of them, and is quick."""
    venv.create(home, with_pip=True)
    run(str(home / "bin/pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    seconds = import_seconds(home / "bin/python")
    tell(f"import semantic_routing: {1000 * seconds:.0f} ms, without any dependency")
    if seconds > IMPORT_SECONDS:
        raise NotReady(f"import semantic_routing takes {seconds:.2f} s, more than {IMPORT_SECONDS}")


def try_whole(wheel: Path, home: Path, scratch: Path) -> None:
    """Install the wheel with its dependencies; train and draw where no compiler can be found."""
    run(str(home / "bin/pip"), "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel))
    smoke(home / "bin", scratch)


def smoke(programs: Path, scratch: Path) -> None:
    """Run the installed command with no other program on the path: help, version, a run, a picture."""
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "PYTHONPATH")}
    env |= {"PATH": str(programs), "SEMROUTE_CACHE": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    command, there = str(programs / "semroute"), str(scratch / "run")
    if "train" not in run(command, "--help", env=env, cwd=scratch):
        raise NotReady("semroute --help does not list its commands")
    if version() not in run(command, "--version", env=env, cwd=scratch):
        raise NotReady(f"semroute --version is not {version()}")
    run(command, "train", "debug", "--out", there, env=env, cwd=scratch)
    run(command, "sample", there, "--prompt", "a red circle", "--out", str(scratch / "images"), env=env, cwd=scratch)
    if not (scratch / "images/00000_00.png").is_file():
        raise NotReady("semroute sample wrote no picture")
    tell("semroute trains and draws from the wheel, without a compiler")


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program and return what it prints; NotReady with its last line if it fails."""
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise NotReady(f"{' '.join(command)} ended with {done.returncode}: {last}")
    return done.stdout


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="accept uncommitted files and a changelog without date")
    parser.add_argument("--quick", action="store_true", help="do not install the dependencies, and train nothing")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        check_versions(rehearse=args.rehearse)
        if not args.rehearse:
            check_tree()
        with tempfile.TemporaryDirectory(prefix="semroute-release-") as name:
            scratch = Path(name)
            wheel, sdist = build(scratch / "dist")
            check_contents(wheel, sdist)
            try_alone(wheel, scratch / "env")
            if not args.quick:
                try_whole(wheel, scratch / "env", scratch)
            (ROOT / "dist").mkdir(exist_ok=True)
            for path in (wheel, sdist):
                shutil.move(path, ROOT / "dist" / path.name)
    except NotReady as reason:
        sys.stderr.write(f"release: {reason}\n")
        return 2
    tell(f"dist/{wheel.name} and dist/{sdist.name} are ready after {time.monotonic() - began:.0f} s; nothing was sent")
    return 0


if __name__ == "__main__":
    sys.exit(main())
