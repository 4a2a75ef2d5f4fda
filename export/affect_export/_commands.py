"""What the workstation's commands share: exit codes, and a word about libraries that are missing."""

import importlib.util
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from affect_runtimes.errors import AffectError, InputError, MissingDependencyError

__all__ = ["exit_code", "require"]


def exit_code(command: str, run: Callable[[], object]) -> int:
    """Runs a command: 0 done, 1 refused (parity, integrity, missing library), 2 usage; says why on stderr.

    A command that is told to stop tidies up first, as one that fails does.
    """
    # Only the main thread may; a command that runs in another one is stopped by whoever started it.
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _stop) if main else None
    try:
        run()
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except (AffectError, OSError) as error:
        # OSError: a full disk, a folder without permission: nothing a traceback would explain better.
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def require(*modules: str, extra: str = "export") -> None:
    """Checks that libraries of an extra are installed, without importing them.

    Raises:
        MissingDependencyError: the message names those that are not, and the pip line.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"this command needs {', '.join(missing)}: pip install 'affect-edge[{extra}]'")
