"""Builds the compiled core ``sparseprune._C``, and ``sparseprune._cuda`` where CUDA is wanted. Never needs torch.

``SPARSEPRUNE_NATIVE``  auto (default): build where a working C++ compiler is, else install without | 0: never | 1:
always, or fail
``SPARSEPRUNE_CUDA``    auto (default): build where both nvcc and a card of capability 8.0 or newer are | 0 | 1:
always, or fail
``SPARSEPRUNE_CUDA_ARCH``  e.g. ``80;90a;100a;120;90+PTX``, which is the default where no driver is; else the machine's
own cards

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
X86, ARM = ("avx2", "avx512", "avx512vnni"), ("neon",)
TIERS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}  # beside the generic one

# The kernel text is the same in every tier; only these flags and the number of lanes differ. dispatch.cpp checks
# each -m flag.
TIER_FLAGS = {
    "csrc/cpu/tiers/generic.cpp": [],
    "csrc/cpu/tiers/avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"],
    "csrc/cpu/tiers/avx512.cpp": [
        "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt",
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512",
    ],
    "csrc/cpu/tiers/avx512vnni.cpp": [
        "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt",
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512",
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


LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


def host_of(compiler: list[str]) -> tuple[str, list[str]]:
    """(the compiler that a command names behind its launchers, its own flags): what nvcc takes as its host's."""
    names = [Path(word).name for word in compiler]
    first = next((place for place, name in enumerate(names) if name not in LAUNCHERS), None)
    if first is None:
        raise SystemExit(f"CXX: expected a compiler behind its launcher, e.g. ccache g++, got {shlex.join(compiler)}")
    return compiler[first], compiler[first + 1 :]


ARCHITECTURES = "80;90a;100a;120;90+PTX"


class CudaExtension(Extension):
    """An extension whose .cu sources are compiled by the nvcc below ``home``, for ``architectures``."""

    home: Path
    architectures: str


def cuda_home() -> Path | None:
    """Where CUDA is installed, by CUDA_HOME or at the usual place: an nvcc on the path may be a mere wrapper."""
    for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"):
        if home and Path(home, "bin", "nvcc").exists():
            return Path(home)
    return None


OLDEST = (8, 0)  # compute capability: cp.async, and matrix instructions of bfloat16


def cards() -> list[tuple[int, int]]:
    """The compute capability of every card, e.g. ``[(8, 0)]``, asked of the driver; empty without driver or card."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), index):
            continue
        for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append((major.value, minor.value))
    return found


def known_to(nvcc: Path) -> list[int]:
    """The cards, as 80, that this nvcc can make code for and our kernels can run on, rising."""
    run = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True)
    numbers = (line.strip().removeprefix("sm_") for line in run.stdout.splitlines())
    return sorted({int(n) for n in numbers if n.isdigit() and int(n) >= 10 * OLDEST[0] + OLDEST[1]})


def architectures_for(here: list[tuple[int, int]], known: list[int]) -> tuple[str, str]:
    """(what to build for these cards, why nothing can be). Code for each card that nvcc knows, and PTX of the newest,
    which the driver translates for the others and for cards to come.
    """
    oldest, seen = ".".join(map(str, OLDEST)), ", ".join(f"{major}.{minor}" for major, minor in sorted(set(here)))
    able = sorted({10 * major + minor for major, minor in here if (major, minor) >= OLDEST})
    if not able:
        remedy = "SPARSEPRUNE_CUDA_ARCH builds for cards that are elsewhere"
        return "", f"a card needs compute capability {oldest} or newer, got {seen}; {remedy}"
    older = [number for number in known if number <= able[-1]]
    if not older:
        return "", f"nvcc knows no card of compute capability {oldest} up to the newest one here; install a newer CUDA"
    return ";".join([*(str(number) for number in able if number in known), f"{older[-1]}+PTX"]), ""


def code_for(architectures: str) -> list[str]:
    """nvcc's flags for e.g. ``80;90a;90+PTX``: machine code each, and PTX, which later cards translate at load."""
    flags = []
    for arch in architectures.split(";"):
        number = arch.removesuffix("+PTX")
        if not number.rstrip("a").isdigit():
            raise SystemExit(f"SPARSEPRUNE_CUDA_ARCH: expected e.g. {ARCHITECTURES}, got {architectures!r}")
        if int(number.rstrip("a")) < 10 * OLDEST[0] + OLDEST[1]:
            raise SystemExit(f"SPARSEPRUNE_CUDA_ARCH: expected 80 or newer, which the kernels need, got {number}")
        kind = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


class BuildExt(build_ext):
    """Compiles each source with its own flags, in parallel through ninja where it is installed, serially where not."""

    def build_extension(self, ext: Extension) -> None:
        wanted = shlex.split(os.environ.get("CXX", ""))  # may begin with a launcher such as ccache
        plain = wanted or [shutil.which("g++") or shutil.which("clang++") or "c++"]
        reason = compiles(
            plain, ["-std=c++17"], "#include <vector>\nint f() { return int(std::vector<int>(3).size()); }\n"
        )
        if reason is not None:
            wish = "SPARSEPRUNE_CUDA" if isinstance(ext, CudaExtension) else "SPARSEPRUNE_NATIVE"
            if setting(wish) == "1":
                raise SystemExit(f"{wish}=1 but no working C++17 compiler ({shlex.join(plain)}): {reason}")
            print(
                f"sparseprune: no working C++17 compiler ({shlex.join(plain)}), installing without {ext.name}: "
                f"{reason}",
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
                jobs.append((target, nvcc_command(ext, plain, source, target)))
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


def nvcc_command(ext: CudaExtension, compiler: list[str], source: str, target: Path) -> list[str]:
    host, own = host_of(compiler)
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-ccbin={host}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += [f"-Xcompiler={flag}" for flag in own]
    flags += code_for(ext.architectures)
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

    sources = [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "encoder_batch", "structure")]
    sources += sources_in("csrc/bindings", "*.cpp")
    sources += [f"csrc/cpu/tiers/{t}.cpp" for t in ("generic", *TIERS.get(platform.machine().lower(), ()))]
    return [Extension("sparseprune._C", sources, include_dirs=[pybind11.get_include()], language="c++")]


def cuda_extension() -> list[Extension]:
    wish, home = setting("SPARSEPRUNE_CUDA"), cuda_home()
    if wish == "0":
        return []
    here = cards()
    if wish == "auto" and (home is None or not here):
        return []
    if home is None:
        raise SystemExit("SPARSEPRUNE_CUDA=1 but no nvcc found; set CUDA_HOME to where CUDA is installed")
    architectures = os.environ.get("SPARSEPRUNE_CUDA_ARCH", "") or ("" if here else ARCHITECTURES)
    reason = ""
    if not architectures:
        architectures, reason = architectures_for(here, known_to(home / "bin" / "nvcc"))
    library = next((p for p in (home / "lib64", home / "lib") if (p / "libcudart_static.a").exists()), None)
    if library is None and not reason:
        reason = f"no libcudart_static.a below {home}; install CUDA's development files"
    if reason and wish == "1":
        raise SystemExit(f"SPARSEPRUNE_CUDA=1 but {reason}")
    if reason:
        print(f"sparseprune: installing without sparseprune._cuda: {reason}", file=sys.stderr)
        return []
    import pybind11

    extension = CudaExtension(
        "sparseprune._cuda",
        [*sources_in("csrc/cuda", "*.cu"), "csrc/cuda/bindings.cpp"],
        include_dirs=[pybind11.get_include(), str(home / "include")],
        extra_compile_args=["-DSPARSEPRUNE_CUDART"],
        extra_link_args=[f"-L{library}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"],
        language="c++",
    )
    extension.home, extension.architectures = home, architectures
    return [extension]


def sources_in(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


setup(ext_modules=[*core_extension(), *cuda_extension()], cmdclass={"build_ext": BuildExt})
