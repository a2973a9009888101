"""Which commit of the repository this program is. `mtsql env` needs it where torch is missing."""

import os
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def git_commit(package: Path = PACKAGE) -> str:
    """The commit of the repository that holds this program, with a mark if there are changes.

    "unknown" without git and for an installed program. The folder in which the run was started and
    git's environment variables have no effect.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*args: str) -> str:
        command = ["git", "-C", str(package), *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # This fails for a repository that only surrounds the package, such as that of a venv.
        git("ls-files", "--error-unmatch", "__init__.py")
        is_changed = bool(git("status", "--porcelain"))
        return git("rev-parse", "HEAD") + (" (changed)" if is_changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
