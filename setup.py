"""Builds the extension blockswap._C with the torch that is installed.

Settings, all read from the environment:
  BLOCKSWAP_BUILD     auto (default), cuda, rocm or cpu. auto follows the installed torch, never the
                      GPUs of this machine: what is built here may run elsewhere.
  BLOCKSWAP_SANITIZE  address or thread: a slow build that finds memory errors or races.
  BLOCKSWAP_LABEL     1: the version names the torch and the device, as in 0.1.0+torch2.13.cpu; for
                      wheels that are handed out. An index wants the sdist's own version.
  BLOCKSWAP_WERROR    1 or 0: warnings are errors (default: 1 in a git checkout, 0 elsewhere).
  CUDA_HOME, CXX, MAX_JOBS, TORCH_CUDA_ARCH_LIST: as for any PyTorch extension.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# Commands that compile. All others (sdist, metadata) work without torch.
COMPILING_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


def refuse(reason: str) -> None:
    """Stop with one readable message instead of a traceback."""
    sys.exit(f"\nblockswap cannot be built: {reason}\n")


def import_torch() -> Any:
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError as error:
        refuse(
            f"it compiles against the PyTorch that it will run with, and this Python has none "
            f"({error}).\nInstall torch first, then: pip install --no-build-isolation blockswap "
            f"(from a checkout: pip install --no-build-isolation -e .)"
        )
    return torch


def choose_build(torch: Any, cuda_home: str | None) -> str:
    """Which device part to build: cuda, rocm or cpu."""
    wanted = os.environ.get("BLOCKSWAP_BUILD", "auto").strip().lower() or "auto"
    if wanted not in ("auto", "cuda", "rocm", "cpu"):
        refuse(f"BLOCKSWAP_BUILD is {wanted!r}; use auto, cuda, rocm or cpu.")
    if wanted == "cpu":
        return "cpu"
    torch_is = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    if wanted != "auto" and wanted != torch_is:
        refuse(
            f"BLOCKSWAP_BUILD={wanted}, but the installed torch {torch.__version__} is a "
            f"{torch_is} build: install a {wanted} build of torch or set BLOCKSWAP_BUILD=auto."
        )
    if torch_is == "cuda" and not cuda_home:
        refuse(
            f"torch {torch.__version__} is a CUDA {torch.version.cuda} build, but no CUDA toolkit "
            f"was found for its headers.\nInstall the toolkit {torch.version.cuda} and set "
            f"CUDA_HOME, or set BLOCKSWAP_BUILD=cpu for an extension that uses no GPU."
        )
    return torch_is


def collect_sources(build: str, has_nvcc: bool) -> list[str]:
    """Paths relative to this file (hipify asks for that), in a fixed order."""
    sources = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        words = path.stem.split("_")
        made_by_hipify = "hip" in (words[0], words[-1])
        needs_gpu_headers = path.parent.name == "device" and path.stem.startswith("cuda")
        if made_by_hipify or (needs_gpu_headers and build == "cpu"):
            continue
        kernel = path.suffix == ".cu" and (build == "rocm" or (build == "cuda" and has_nvcc))
        if path.suffix == ".cpp" or kernel:
            sources.append(path.relative_to(ROOT).as_posix())
    return sources


def make_version() -> str:
    """The version; where asked, with the torch that it is built for: a wheel fits one minor."""
    text = (ROOT / "blockswap" / "__init__.py").read_text()
    version = next(line for line in text.splitlines() if line.startswith("__version__"))
    version = version.split('"')[1]
    if os.environ.get("BLOCKSWAP_LABEL", "") != "1" or "sdist" in sys.argv:
        return version
    torch = import_torch()
    from torch.utils import cpp_extension

    build = choose_build(torch, cpp_extension.CUDA_HOME)
    with_what = {"cuda": torch.version.cuda, "rocm": torch.version.hip, "cpu": ""}[build] or ""
    device = {"cuda": "cu", "rocm": "rocm", "cpu": "cpu"}[build]
    device += "".join(with_what.split(".")[:2])
    return f"{version}+torch{'.'.join(torch.__version__.split('.')[:2])}.{device}"


def make_build_info(torch: Any, build: str, sanitize: str) -> str:
    lines = [
        '"""What blockswap._C was built for. Written by setup.py; not committed."""',
        "",
        f"TORCH: str = {str(torch.__version__)!r}",
        f"CUDA: str | None = {(torch.version.cuda if build == 'cuda' else None)!r}",
        f"HIP: str | None = {(torch.version.hip if build == 'rocm' else None)!r}",
        f"BUILD: str = {build!r}",
        f"SANITIZE: str = {sanitize!r}",
    ]
    return "\n".join(lines) + "\n"


def make_extension() -> tuple[list[Extension], dict[str, Any]]:
    torch = import_torch()
    from torch.utils import cpp_extension

    build = choose_build(torch, cpp_extension.CUDA_HOME)
    sanitize = os.environ.get("BLOCKSWAP_SANITIZE", "").strip().lower()
    if sanitize not in SANITIZERS:
        refuse(f"BLOCKSWAP_SANITIZE is {sanitize!r}; use address, thread or nothing.")

    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    has_nvcc = build == "cuda" and bool(shutil.which(str(nvcc)))
    sources = collect_sources(build, has_nvcc)
    if not sources:
        refuse(f"no C++ sources under {ROOT / 'csrc'}; is this a whole checkout?")

    device_type = "cpu" if build == "cpu" else "cuda"
    # Named a second time with -isystem, a folder of -I counts as the system's: headers that are not
    # ours may warn, ours may not.
    flags = [f"-isystem{path}" for path in cpp_extension.include_paths(device_type)]
    flags += ["-O2", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
    if os.environ.get("BLOCKSWAP_WERROR", "1" if (ROOT / ".git").exists() else "0") == "1":
        flags.append("-Werror")
    if sanitize:
        flags += [*SANITIZERS[sanitize], "-g1", "-fno-omit-frame-pointer"]

    macros: list[tuple[str, str | None]] = []
    if build != "cpu":
        macros.append(("BS_WITH_GPU", "1"))
    if any(source.endswith(".cu") for source in sources):
        macros.append(("BS_WITH_KERNELS", "1"))

    make = cpp_extension.CppExtension if build == "cpu" else cpp_extension.CUDAExtension
    extension = make(
        "blockswap._C",
        sources,
        define_macros=macros,
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path) for path in (ROOT / "csrc").rglob("*.h*")] + [__file__],
        extra_compile_args={"cxx": flags, "nvcc": ["-O2"]},
        extra_link_args=SANITIZERS[sanitize],
    )
    info = make_build_info(torch, build, sanitize)

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc,name-defined]
        """BuildExtension that records what it built for, and rebuilds when that has changed."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # ninja does not see that headers outside this checkout changed: one folder per torch.
            name = "-".join(filter(None, ("objects", torch.__version__, build, sanitize)))
            self.build_temp = str(Path(self.build_temp, name))
            self.force = self._read(Path(self.build_lib)) != info

        def run(self) -> None:
            print(f"blockswap._C: {build} build for torch {torch.__version__}", flush=True)
            super().run()
            # A wheel is made of build_lib; an editable or in-place build imports from the checkout.
            for folder in [Path(self.build_lib)] + [ROOT] * bool(self.inplace):
                if self._read(folder) != info:
                    (folder / "blockswap" / "_build_info.py").write_text(info)

        @staticmethod
        def _read(folder: Path) -> str:
            path = folder / "blockswap" / "_build_info.py"
            return path.read_text() if path.is_file() else ""

    return [extension], {"build_ext": Build}


if sys.platform == "win32":
    refuse("it runs on Linux and under WSL2, not on native Windows.")
if int(setuptools.__version__.split(".")[0]) < 77:
    refuse(f"setuptools {setuptools.__version__} is too old for pyproject.toml; it needs 77.")
if COMPILING_COMMANDS.intersection(sys.argv):
    ext_modules, cmdclass = make_extension()
    setup(version=make_version(), ext_modules=ext_modules, cmdclass=cmdclass)
else:
    setup(version=make_version())
