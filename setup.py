"""Builds the parts of Tandem that are not plain Python: the C++ extension and the protobuf code.

    python setup.py build_proto              generate tandem/<noun>/v1/*_pb2*.py from protos/
    python setup.py build_ext --inplace      build weight_transfer/_core

``pip install .`` does both. Environment: ``TANDEM_WERROR=1`` makes the compiler's warnings errors,
``TANDEM_BUILD_JOBS`` limits how many files compile at once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Command, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
PROTOS = ROOT / "protos"
# Generated code needs a protobuf runtime no older than its generator's: this one's serves protobuf 6 and 7.
GRPCIO_TOOLS = "1.80.1"


def proto_folders() -> dict[Path, list[Path]]:
    """Every folder with .proto files (relative to protos/) and its files, sorted."""
    folders: dict[Path, list[Path]] = {}
    for proto in sorted(PROTOS.glob("tandem/**/*.proto")):
        folders.setdefault(proto.parent.relative_to(PROTOS), []).append(proto)
    return folders


def generated_names(proto: Path) -> list[str]:
    return [f"{proto.stem}_pb2.py", f"{proto.stem}_pb2.pyi", f"{proto.stem}_pb2_grpc.py"]


def stamp(protos: list[Path]) -> str:
    """The generated package's __init__.py: it names what it was made from, and so tells when it is stale.

    Not modification times: a copied tree (a container, a GPU host) has arbitrary ones.
    """
    digest = hashlib.sha256(f"grpcio-tools=={GRPCIO_TOOLS}\n".encode())
    for proto in protos:
        digest.update(f"{proto.name}\n".encode() + proto.read_bytes())
    return f"# Generated from protos/ by setup.py build_proto; do not edit.\n# sha256:{digest.hexdigest()}\n"


def is_fresh(folder: Path, protos: list[Path]) -> bool:
    init = ROOT / folder / "__init__.py"
    names = [name for proto in protos for name in generated_names(proto)]
    return (
        init.is_file()
        and init.read_text() == stamp(protos)
        and all((ROOT / folder / name).is_file() for name in names)
    )


class build_proto(Command):  # noqa: N801 (setuptools names commands so)
    """Generates protobuf and gRPC code next to the hand-written modules of ``tandem``."""

    description = "generate Python code from protos/"
    user_options = [("force", "f", "generate also where nothing changed")]  # noqa: RUF012
    boolean_options = ["force"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.force = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        folders = proto_folders()
        if not folders:
            raise SetupError(f"no .proto files under {PROTOS}")
        stale = {
            folder: protos for folder, protos in folders.items() if self.force or not is_fresh(folder, protos)
        }
        if not stale:
            return
        self.check_tools(stale)
        # Generated aside and then moved: a process that imports meanwhile never sees half a file.
        with tempfile.TemporaryDirectory(dir=ROOT, prefix=".build-proto-") as scratch:
            self.generate([proto for protos in stale.values() for proto in protos], Path(scratch))
            for folder, protos in stale.items():
                self.install(Path(scratch) / folder, ROOT / folder, protos)

    def check_tools(self, stale: dict[Path, list[Path]]) -> None:
        try:
            found = importlib.metadata.version("grpcio-tools")
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != GRPCIO_TOOLS:
            folders = ", ".join(str(folder) for folder in stale)
            raise SetupError(
                f"the generated code in {folders} is missing or older than protos/, and grpcio-tools is "
                f"{found} where {GRPCIO_TOOLS} is needed: run `pip install --no-deps -e .`, whose isolated "
                f"build brings it, or `pip install --no-deps grpcio-tools=={GRPCIO_TOOLS}` here, "
                f"or bring the generated files along"
            )

    def generate(self, protos: list[Path], into: Path) -> None:
        # A process of its own: it loads no protobuf runtime into this one.
        outputs = [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *map(str, protos)]
        if subprocess.run(command, check=False).returncode != 0:
            raise SetupError("protoc failed; its message is above")

    def install(self, made: Path, folder: Path, protos: list[Path]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*_pb2*.py*"):
            if not (made / old.name).exists():
                old.unlink()
        for name in [name for proto in protos for name in generated_names(proto)]:
            (made / name).replace(folder / name)
        for parent in folder.relative_to(ROOT).parents:
            if parent != Path() and not (ROOT / parent / "__init__.py").exists():
                (ROOT / parent / "__init__.py").touch()
        (folder / "__init__.py").write_text(stamp(protos))


class egg_info_with_proto(egg_info):  # noqa: N801
    """Every way to build or install begins here, and lists the packages, which must exist by then."""

    def run(self) -> None:
        self.run_command("build_proto")
        super().run()


class build_py_with_proto(build_py):  # noqa: N801
    """Also puts the .proto files into the wheel, as tandem/protos, to generate other clients from."""

    def run(self) -> None:
        self.run_command("build_proto")
        super().run()
        if not self.editable_mode:
            for folder, protos in proto_folders().items():
                target = Path(self.build_lib, "tandem", "protos", folder)
                target.mkdir(parents=True, exist_ok=True)
                for proto in protos:
                    shutil.copy2(proto, target)


def packages() -> list[str]:
    """Hand-written packages, and those that build_proto will have made by the time they are needed."""
    names = set(
        find_packages(include=["tandem*", "weight_transfer*", "inference_service*", "trainer_service*"])
    )
    for folder in proto_folders():
        names.update(".".join(parent.parts) for parent in (folder, *folder.parents) if parent != Path())
    return sorted(names)


def extension() -> Pybind11Extension:
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
    if os.environ.get("TANDEM_WERROR") == "1":
        flags.append("-Werror")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.hpp"))
    return Pybind11Extension(
        "weight_transfer._core",
        sources,
        depends=headers,
        include_dirs=["csrc"],
        cxx_std=20,
        extra_compile_args=flags,
        extra_link_args=["-pthread"],
    )


ParallelCompile("TANDEM_BUILD_JOBS", default=0).install()
os.chdir(ROOT)
setup(
    package_dir={"": "."},  # so that an editable install is one line in a .pth file
    packages=packages(),
    package_data={"": ["py.typed", "*.pyi", "*.cu", "*.cuh"], "tandem.dashboard": ["static/*"]},
    ext_modules=[extension()],
    cmdclass={
        "build_ext": build_ext,
        "build_proto": build_proto,
        "build_py": build_py_with_proto,
        "egg_info": egg_info_with_proto,
    },
)
