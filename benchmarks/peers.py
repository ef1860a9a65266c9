"""Where DeepSpeed is: here, in a Python that a person names, or in an environment made for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(".venv-deepspeed")
#: Its AutoEP reads a private table of transformers' that is another thing in later releases.
WANTED = ("torch==2.13.0", "deepspeed==0.19.*", "transformers==5.16.*", "numpy", "tqdm", "setuptools", "wheel")


def deepspeed_python(named: str | None, make: bool) -> tuple[str | None, str]:
    """The Python that imports DeepSpeed, or None; and what to say of it."""
    if named:
        return _checked(named, f"--deepspeed-python {named}")
    made = FOLDER / "bin" / "python"
    if made.exists():
        python, said = _checked(str(made.absolute()), str(FOLDER))
        if python or not make:
            return python, said
    if make:
        return _make(made)
    python, said = _checked(sys.executable, "this Python")
    return python, said if python else "no DeepSpeed here; --with-deepspeed makes an environment for it"


def _checked(python: str, name: str) -> tuple[str | None, str]:
    try:
        done = subprocess.run(
            [python, "-c", "import deepspeed, torch; print('\\n', deepspeed.__version__, torch.__version__)"],
            capture_output=True,
            text=True,
            timeout=180,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{name}: {error}"
    if done.returncode:
        return None, f"{name} cannot import deepspeed: {_last(done.stderr)}"
    deepspeed, torch = done.stdout.split()[-2:]
    return python, f"{name}: deepspeed {deepspeed}, torch {torch}"


def _make(python: Path) -> tuple[str | None, str]:
    """An environment of its own; DeepSpeed's set-up asks for torch, so that is installed first."""
    print(f"making {FOLDER} with {', '.join(WANTED)}", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    deepspeed = next(w for w in WANTED if w.startswith("deepspeed"))
    for command in (
        [sys.executable, "-m", "venv", str(FOLDER)],
        [*pip, *(w for w in WANTED if w != deepspeed)],
        [*pip, "--no-build-isolation", deepspeed],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, f"DeepSpeed could not be installed: {error}"
        if done.returncode:
            return None, f"DeepSpeed could not be installed: {_last(done.stderr)}"
    return _checked(str(python.absolute()), str(FOLDER))


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
