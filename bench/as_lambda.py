"""Loads one function as Lambda does, in a process of its own: the layer, the runtime's boto3 and nothing else.

As a script (`python -I -S bench/as_lambda.py SUBJECT cached|source`) it times one cold start, of a function or of the
official SDK. Isolated, so that no other package of this environment is found.
"""

import importlib.util
import json
import resource
import sys
import time
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    PathFinder,
    SourceFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAYER = ROOT / ".aws-sam/local/SharedLayer/python"
_PACKAGES = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
SITE, SDK_SITE = ROOT / ".venv" / _PACKAGES, ROOT / ".venv-sandbox" / _PACKAGES
RUNTIME_BRINGS = ("boto3", "botocore", "s3transfer", "urllib3", "dateutil", "six")
SDK = "sdk"
BUILDERS = {  # what a handler calls first: it builds the function's clients
    "poller": ["claimer"],
    "launcher": ["launcher", "sqs"],
    "keeper": ["keeper"],
    "stopper": ["stopper"],
    "observer": ["observer"],
    "janitor": ["janitor"],
    "webhook": ["webhook"],
    "tickets": ["tickets"],
    "image": ["builder"],
}


class _Runtime:
    """Finds what Lambda's runtime brings, in the development environment."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG004  its interface
        return PathFinder.find_spec(name, [str(SITE)]) if path is None and name in RUNTIME_BRINGS else None


class _SourceOnly(SourceFileLoader):
    """Compiles at each import, as in a package without bytecode on a file system that takes none."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def without_bytecode(folder: str) -> FileFinder:
    """A path hook: in the packages, not in the standard library, only source is found."""
    if not folder.startswith((str(LAYER), str(SITE), str(SDK_SITE))):
        raise ImportError
    return FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_SourceOnly, SOURCE_SUFFIXES))


def surround() -> None:
    """From now on, imports find what they would find in a function."""
    sys.path.insert(0, str(LAYER))
    sys.meta_path.append(_Runtime())


def load(function: str) -> ModuleType:
    """The function's module, freshly imported."""
    spec = importlib.util.spec_from_file_location("app", ROOT / "functions" / function / "app.py")
    assert spec and spec.loader  # noqa: S101, PT018  a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(function: str, module: ModuleType) -> None:
    """Build what the handler builds at its first event."""
    for name in BUILDERS[function]:
        getattr(module, name)()


def peak_mb() -> float:
    """The most memory that this process had so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss counts what the parent had before the exec
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def _start(subject: str) -> dict[str, float]:
    began, wall = time.process_time(), time.perf_counter()
    if subject == SDK:
        sys.path.insert(0, str(SDK_SITE))
        module = importlib.import_module("anthropic")
        imported = time.process_time()
        module.AsyncAnthropic(auth_token="none", base_url="http://127.0.0.1:9")  # noqa: S106  it makes no call
    else:
        surround()
        module = load(subject)
        imported = time.process_time()
        build(subject, module)
    ended = time.process_time()
    return {
        "import_ms": (imported - began) * 1000,
        "build_ms": (ended - imported) * 1000,
        "wall_ms": (time.perf_counter() - wall) * 1000,
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    if sys.argv[2] == "source":
        sys.path_hooks.insert(0, without_bytecode)
    print(json.dumps(_start(sys.argv[1])))
