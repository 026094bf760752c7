"""`python -m chronicals_trl script.py ...`: register(), then run the script as Python itself would.

The script's `sys.argv`, `sys.path[0]`, `__main__`, exit code and traceback are those of `python script.py ...`
(`python -m pkg.train ...` for `-m`). runpy is not used: it puts frames of its own into tracebacks, and takes the
script's `__main__` out of `sys.modules` before exit handlers run.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shlex
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from chronicals_trl import __version__
from chronicals_trl._environment import check_environment
from chronicals_trl._register import register
from chronicals_trl.cli import COMMANDS

USAGE = """\
usage: python -m chronicals_trl [-h] [--version] script.py [args ...]
       python -m chronicals_trl -m package.module [args ...]

Run a TRL training script in which `from trl import SFTConfig, SFTTrainer` gives chronicals-trl's classes.
Give the script `--use_chronicals True` to switch them on. In place of `python`: `accelerate launch` or `torchrun`.
Without a script: `chronicals-trl sft`; what this machine can do: `chronicals-trl doctor`.
"""


def main() -> None:
    """Run the script or module that `sys.argv` names; returns when it has come to its end."""
    arguments = sys.argv[1:]
    if not arguments:
        sys.stderr.write(USAGE)
        raise SystemExit(2)
    first = arguments[0]
    if first in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if first == "--version":
        print(__version__)
        return
    if first == "-m":
        if len(arguments) == 1:
            sys.stderr.write(f"Argument expected for the -m option\n{USAGE}")
            raise SystemExit(2)
        _register()
        _run_module(arguments[1], arguments[2:])
    elif first.startswith("-"):
        sys.stderr.write(f"unknown option {first}\n{USAGE}")
        raise SystemExit(2)
    else:
        _register()
        _run_script(first, arguments[1:])


def _register() -> None:
    try:
        # Here, and not in the script's SFTConfig alone: the script may never make one of ours.
        check_environment()
    except ValueError as error:
        _fail(str(error), 2)
    register()


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{sys.executable}: {message}\n")
    raise SystemExit(code)


def _run_script(script: str, arguments: list[str]) -> None:
    # As the interpreter does it: absolute, but not normalised, and links not resolved.
    path = os.path.join(os.getcwd(), script)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        hint = ""
        if script in COMMANDS and isinstance(error, FileNotFoundError):
            command = shlex.join(["chronicals-trl", script, *arguments])
            hint = f"\n{script!r} is a command of the console script: {command}"
        _fail(f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}{hint}", 2)
    sys.argv[:] = [script, *arguments]
    # `python -m` put the working directory there; a script has its own folder, unless -P keeps both out.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    with _OwnTraceback():
        code = compile(source, path, "exec", dont_inherit=True)
        module = _as_main({"__file__": path, "__loader__": SourceFileLoader("__main__", path), "__cached__": None})
        exec(code, module.__dict__)


def _run_module(name: str, arguments: list[str]) -> None:
    sys.argv[:] = ["-m", *arguments]
    with _OwnTraceback():
        spec = _find(name)
        if spec is not None and spec.submodule_search_locations is not None:
            package, name = name, f"{name}.__main__"
            spec = _find(name)
            if spec is None:
                _fail(f"No module named {name}; {package!r} is a package and cannot be directly executed", 1)
        if spec is None or spec.loader is None:
            _fail(f"No module named {name}", 1)
        loader: Any = spec.loader
        code = loader.get_code(spec.name)
        if code is None:
            _fail(f"No code object available for {name}", 1)
        sys.argv[0] = spec.origin or name
        # The spec's name is what spawned processes import the module by.
        module = _as_main(
            {
                "__file__": spec.origin,
                "__cached__": spec.cached,
                "__loader__": spec.loader,
                "__package__": spec.parent,
                "__spec__": spec,
            }
        )
        exec(code, module.__dict__)


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        # A parent that does not exist is a misspelt name; a parent that fails to import something is the user's bug.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


def _as_main(attributes: dict[str, Any]) -> ModuleType:
    """A fresh `__main__` in `sys.modules`, so that classes which the script defines can be pickled by name."""
    module = ModuleType("__main__")
    module.__dict__.update(attributes)
    sys.modules["__main__"] = module
    return module


class _OwnTraceback:
    """Lets an exception through, and takes our frames off its traceback when it is shown.

    The exception goes on to the interpreter, which sets exit codes and signals as always (an interrupt ends in
    SIGINT's own status). The hook that is wrapped is the one in force then, so a script's `sys.excepthook` is called.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        shown_by = sys.excepthook

        def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
            trimmed = _from_script_on(traceback)
            shown_by(kind, error.with_traceback(trimmed), trimmed)

        sys.excepthook = excepthook


def _from_script_on(traceback: TracebackType | None) -> TracebackType | None:
    """`traceback` from the first frame that is neither ours nor runpy's nor the import system's."""
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not (file == __file__ or file.startswith("<frozen ") or os.path.basename(file) == "runpy.py"):
            break
        traceback = traceback.tb_next
    return traceback


if __name__ == "__main__":
    main()
