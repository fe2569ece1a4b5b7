"""Builds the compiled core ``sparseprune._C``, and ``sparseprune._cuda`` where CUDA is wanted. Never needs torch.

``SPARSEPRUNE_NATIVE``  auto (default): build where a working C++ compiler is, else install without | 0: never | 1:
always, or fail ``SPARSEPRUNE_CUDA``    auto (default): build where both nvcc and a driver are | 0 | 1: always, or fail
``SPARSEPRUNE_CUDA_ARCH``  e.g. ``80;90a;100a;120;90+PTX`` (the default builds the machine's own card where a driver
is)

A compiler that works and a source that does not compile is always fatal: the core is never lost unnoticed.
"""

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# The kernel text is the same in every tier; only these flags and the number of lanes differ. dispatch.cpp checks
# each -m flag.
TIER_FLAGS = {
    "csrc/cpu/tiers/generic.cpp": [],
    "csrc/cpu/tiers/avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"],
    "csrc/cpu/tiers/avx512.cpp": [
        "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt",
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512",
    ],
}  # fmt: skip
BASE_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall"]


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


def compiles(compiler: list[str], flags: list[str], text: str) -> str | None:
    """Tries to compile and link a small shared object; returns None when it works, else the reason."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(text)
        command = [*compiler, *flags, "-fPIC", "-shared", str(source), "-o", str(Path(folder, "probe.so"))]
        try:
            run = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        return None if run.returncode == 0 else (run.stderr.strip() or f"{command[0]} exited {run.returncode}")


ARCHITECTURES = "80;90a;100a;120;90+PTX"


class CudaExtension(Extension):
    """An extension whose .cu sources are compiled by the nvcc below ``home``."""

    home: Path


def cuda_home() -> Path | None:
    """Where CUDA is installed, by CUDA_HOME or at the usual place: an nvcc on the path may be a mere wrapper."""
    for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"):
        if home and Path(home, "bin", "nvcc").exists():
            return Path(home)
    return None


def card() -> str | None:
    """The compute capability of the first card, e.g. ``80``, asked of the driver; None without a driver or a card."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"{major.value}{minor.value}"


def code_for(architectures: str) -> list[str]:
    """nvcc's flags for e.g. ``80;90a;90+PTX``: machine code each, and PTX, which later cards translate at load."""
    flags = []
    for arch in architectures.split(";"):
        number = arch.removesuffix("+PTX")
        if not number.rstrip("a").isdigit():
            raise SystemExit(f"SPARSEPRUNE_CUDA_ARCH: expected e.g. {ARCHITECTURES}, got {architectures!r}")
        kind = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


class BuildExt(build_ext):
    """Compiles each source with its own flags, in parallel through ninja where it is installed, serially where not."""

    def build_extension(self, ext: Extension) -> None:
        plain = [os.environ.get("CXX", "").strip() or shutil.which("g++") or shutil.which("clang++") or "c++"]
        reason = compiles(
            plain, ["-std=c++17"], "#include <vector>\nint f() { return int(std::vector<int>(3).size()); }\n"
        )
        if reason is not None:
            wish = "SPARSEPRUNE_CUDA" if isinstance(ext, CudaExtension) else "SPARSEPRUNE_NATIVE"
            if setting(wish) == "1":
                raise SystemExit(f"{wish}=1 but no working C++17 compiler ({plain[0]}): {reason}")
            print(
                f"sparseprune: no working C++17 compiler ({plain[0]}), installing without {ext.name}: {reason}",
                file=sys.stderr,
            )
            return
        openmp = (
            ["-fopenmp"]
            if compiles(plain, ["-fopenmp"], "#include <omp.h>\nint f() { return omp_get_max_threads(); }\n") is None
            else []
        )
        if not openmp:
            print("sparseprune: the compiler has no OpenMP, the compiled core will run on one thread", file=sys.stderr)
        folder = Path(self.build_temp, ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        own = shlex.split(os.environ.get("CXXFLAGS", ""))  # last, so that a user's flags win
        include = [f"-I{path}" for path in [ROOT / "csrc", *ext.include_dirs, *python_includes()]]
        jobs = []
        for source in ext.sources:
            target = folder / (source.replace("/", "_") + ".o")
            if source.endswith(".cu"):
                jobs.append((target, nvcc_command(ext, plain[0], source, target)))
                continue
            flags = [*BASE_FLAGS, *openmp, "-fPIC", *include, *TIER_FLAGS.get(source, [])]
            flags += [*ext.extra_compile_args, *own]
            jobs.append((target, [*plain, *flags, "-c", str(ROOT / source), "-o", str(target)]))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(output.name + ".partial")
        run_jobs(jobs, folder)
        shared = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        objects = [str(target) for target, _ in jobs] + list(ext.extra_objects)
        strip = ["-Wl,-s"] if sys.platform.startswith("linux") else []
        check([*plain, *shared, *objects, *openmp, *own, *strip, *ext.extra_link_args, "-o", str(unfinished)])
        os.replace(unfinished, output)  # a process that has the old module mapped keeps its own copy


def nvcc_command(ext: CudaExtension, host: str, source: str, target: Path) -> list[str]:
    architectures = os.environ.get("SPARSEPRUNE_CUDA_ARCH") or card() or ARCHITECTURES
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-ccbin={host}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += code_for(architectures)
    return [str(ext.home / "bin" / "nvcc"), *flags, "-c", str(ROOT / source), "-o", str(target)]


def python_includes() -> list[str]:
    import sysconfig

    return sorted({sysconfig.get_path("include"), sysconfig.get_path("platinclude")})


def check(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(run.stdout + run.stderr)  # ninja prints what its compilers say on stdout
    if run.returncode:
        raise SystemExit(f"sparseprune: this command failed with {run.returncode}:\n{' '.join(command)}")


def run_jobs(jobs: list[tuple[Path, list[str]]], folder: Path) -> None:
    """Runs one compile command an object: through ninja (parallel, and only what changed) or one after another."""
    ninja = shutil.which("ninja")
    if ninja is None:
        for _, command in jobs:
            check(command)
        return

    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"builddir = {escape(str(folder))}",
        "rule cxx",
        "  command = $cmd -MMD -MF $out.d",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CXX $out",
    ]
    for target, command in jobs:
        source = command[command.index("-c") + 1]
        lines += [
            f"build {escape(str(target))}: cxx {escape(source)}",
            f"  cmd = {' '.join(command).replace('$', '$$')}",
        ]
    Path(folder, "build.ninja").write_text("\n".join(lines) + "\n")
    check([ninja, "-f", str(folder / "build.ninja")])


def core_extension() -> list[Extension]:
    if setting("SPARSEPRUNE_NATIVE") == "0":
        return []
    import pybind11

    sources = ["csrc/cpu/dispatch.cpp", *sources_in("csrc/bindings", "*.cpp")]
    sources += [s for s in TIER_FLAGS if X86 or s.endswith("generic.cpp")]
    return [Extension("sparseprune._C", sources, include_dirs=[pybind11.get_include()], language="c++")]


def cuda_extension() -> list[Extension]:
    wish, home = setting("SPARSEPRUNE_CUDA"), cuda_home()
    if wish == "0" or (wish == "auto" and (home is None or card() is None)):
        return []
    if home is None:
        raise SystemExit("SPARSEPRUNE_CUDA=1 but no nvcc found; set CUDA_HOME to where CUDA is installed")
    import pybind11

    library = next((p for p in (home / "lib64", home / "lib") if (p / "libcudart_static.a").exists()), None)
    if library is None:
        raise SystemExit(f"SPARSEPRUNE_CUDA: no libcudart_static.a below {home}; install CUDA's development files")
    extension = CudaExtension(
        "sparseprune._cuda",
        [*sources_in("csrc/cuda", "*.cu"), "csrc/cuda/bindings.cpp"],
        include_dirs=[pybind11.get_include(), str(home / "include")],
        extra_compile_args=["-DSPARSEPRUNE_CUDART"],
        extra_link_args=[f"-L{library}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"],
        language="c++",
    )
    extension.home = home
    return [extension]


def sources_in(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


setup(ext_modules=[*core_extension(), *cuda_extension()], cmdclass={"build_ext": BuildExt})
