"""Stub CUDA libraries: compiled from ``cuda/*.c``, and filled up with functions that do nothing.

Which libraries and functions are needed, onnxruntime's CUDA provider says itself: as undefined symbols or, of
cuDNN, as names to look up. What ``cuda/`` does not define is generated and writes its name into the log:
``Create`` functions give a handle, ``Get`` functions fail, for they would have to fill in something, those of
cuBLAS tell their handle's stream, and all others succeed.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from emag_export.errors import MissingDependencyError

__all__ = ["CUDA_RUNTIME", "build_libraries", "needed_symbols", "require_compiler"]

SOURCES = Path(__file__).parent / "cuda"
CUDA_RUNTIME = "libcudart.so.13"

_WRITTEN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        CUDA_RUNTIME: ("capture.c", "device.c", "kernels.c", "memory.c"),
        "libcublas.so.13": ("cublas.c",),
        "libcublasLt.so.13": ("cublasLt.c",),
        "libcudnn.so.9": ("cudnn.c",),
    }
)
"""Library to what is written by hand for it; ``log.c`` goes into every one."""

_DRIVER, _CUDNN = "libcuda.so.1", "libcudnn.so.9"
"""Symbols of the driver have no versions, and cuDNN is opened by name: the provider is not linked with it."""

_GENERATED = """\
#include "log.h"
#include <stdlib.h>
"""
_HANDLE = 'int {name}(void **handle) {{ log_line("call name={name}"); *handle = malloc(1024); return 0; }}\n'
_ON_STREAM = 'int {name}(void **handle) {{ log_line("call name={name} stream=%p", *handle); return 0; }}\n'
_NOTHING = 'int {name}(void) {{ log_line("call name={name}"); return {status}; }}\n'


def needed_symbols(provider: Path) -> dict[str, set[str]]:
    """CUDA libraries that onnxruntime's CUDA provider is linked with, and what it takes from each.

    Args:
        provider: ``libonnxruntime_providers_cuda.so``.
    """
    dynamic = _run("readelf", "-d", str(provider))
    needed: dict[str, set[str]] = {
        name: set() for name in re.findall(r"\(NEEDED\).*\[(libcu\w+\.so[.\d]*)\]", dynamic)
    }
    for name, library in re.findall(
        r" U (\w+)(?:@+(\S+))?$", _run("nm", "-D", "--undefined-only", str(provider)), re.M
    ):
        if library in needed:
            needed[library].add(name)
        elif not library and re.match(r"cu[A-Z]", name):
            needed[_DRIVER].add(name)
    needed[_CUDNN] = {name.decode() for name in re.findall(rb"\b(cudnn[A-Z]\w+)\0", provider.read_bytes())}
    return needed


def require_compiler() -> None:
    """Refuse to go on without gcc, which brings nm and readelf.

    Raises:
        MissingDependencyError: If there is none.
    """
    if shutil.which("gcc") is None:
        raise MissingDependencyError(
            "gcc, which compiles the stub CUDA libraries, is not installed: apt install gcc"
        )


def build_libraries(folder: Path, needed: Mapping[str, Iterable[str]]) -> None:
    """Compile one library per entry into ``folder``, for ``LD_LIBRARY_PATH``.

    Args:
        folder: Is made if it does not exist.
        needed: Name of the library to the functions it must have.

    Raises:
        MissingDependencyError: If there is no gcc.
    """
    require_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    for library, symbols in needed.items():
        _build(folder, library, set(symbols))


def _build(folder: Path, library: str, symbols: set[str]) -> None:
    stem = library.split(".")[0]
    sources = [SOURCES / name for name in ("log.c", *_WRITTEN.get(library, ()))]
    written = _defined(sources, folder / f"{stem}-written.o")
    generated, versions = folder / f"{stem}.c", folder / f"{stem}.map"
    generated.write_text(_GENERATED + "".join(_function(name) for name in sorted(symbols - written)), "utf-8")
    versions.write_text(f"{library} {{ global: *; local: log_line; }};\n", "utf-8")
    versioned = [] if library in (_DRIVER, _CUDNN) else [f"-Wl,--version-script={versions}"]
    _compile("-shared", f"-Wl,-soname,{library}", *versioned, *sources, generated, "-o", folder / library)


def _defined(sources: Iterable[Path], scratch: Path) -> set[str]:
    """Functions that these files define."""
    names = set()
    for source in sources:
        _compile("-c", source, "-o", scratch)
        names.update(re.findall(r" T (\w+)$", _run("nm", str(scratch)), re.M))
    scratch.unlink()
    return names


def _function(name: str) -> str:
    if "Create" in name:
        return _HANDLE.format(name=name)
    if re.match(r"cublas[A-Z](?!t)", name):
        return _ON_STREAM.format(name=name)
    return _NOTHING.format(name=name, status=int("Get" in name))


def _compile(*arguments: str | Path) -> None:
    flags = ("-std=gnu11", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}")
    _run("gcc", *flags, *map(str, arguments))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout
