"""What the workstation's commands share: exit codes, and a word about libraries that are missing."""

import importlib.util
import sys
from collections.abc import Callable

from affect_runtimes.errors import AffectError, InputError, MissingDependencyError

__all__ = ["exit_code", "require"]


def exit_code(command: str, run: Callable[[], object]) -> int:
    """Runs a command: 0 done, 1 refused (parity, integrity, missing library), 2 usage; says why on stderr."""
    try:
        run()
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except AffectError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    return 0


def require(*modules: str) -> None:
    """Checks that libraries of the export extra are installed, without importing them.

    Raises:
        MissingDependencyError: the message names those that are not, and the pip line.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"this command needs {', '.join(missing)}: pip install 'affect-edge[export]'")
