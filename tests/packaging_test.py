"""The sdist and the wheel hold everything, and the wheel works outside of the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import mojax
from mojax import recipe

ROOT = Path(__file__).parents[1]
SOURCES = ("mojax", "transforms", "kernels", "converters", "recipes")


def run(*command, at, **options):
    done = subprocess.run([str(c) for c in command], cwd=at, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that was built from the sdist, as a packager does."""
    copy = tmp_path_factory.mktemp("source")
    for room in SOURCES:
        shutil.copytree(ROOT / room, copy / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    run(sys.executable, "-m", "build", "--outdir", copy / "dist", at=copy)
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    (wheel,) = (copy / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A new environment with the wheel; what mojax depends on is taken from this one, not installed again."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        built[1],
        at=folder,
    )
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", at=folder).strip()
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def package_files():
    """What the package consists of, as named inside it."""
    listed = set()
    for path in (ROOT / "mojax").rglob("*"):
        listed.add(path.relative_to(ROOT))
    for room in SOURCES[1:]:
        listed |= {Path("mojax") / path.relative_to(ROOT) for path in (ROOT / room).rglob("*")}
    inside = (p for p in listed if (ROOT / p).is_file() and "__pycache__" not in p.parts)
    return {str(p) for p in inside}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licence = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
        assert licence and b"Apache License" in wheel.read(licence[0])
    assert names == package_files()
    assert {"mojax/py.typed", "mojax/transforms/rtn.py", "mojax/recipes/nvfp4.yaml"} <= names
    assert {"mojax/data/tiny/model.safetensors", "mojax/data/text/calibration.txt"} <= names


def test_the_sdist_holds_real_files(built):
    with tarfile.open(built[0]) as sdist:
        members = {m.name.partition("/")[2]: m for m in sdist.getmembers()}
    assert package_files() <= members.keys()
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert {"pyproject.toml", "README.md", "LICENSE"} <= members.keys()


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mojax.__version__
    assert f"## {mojax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_no_short_names_are_installed(installed, tmp_path):
    """`kernels` is the import name of another package, which transformers looks for."""
    code = """if True:
        import importlib.machinery, sys
        folder = next(p for p in sys.path if p.startswith(sys.prefix) and p.endswith("site-packages"))
        for name in ("transforms", "kernels", "converters", "recipes"):
            assert importlib.machinery.PathFinder.find_spec(name, [folder]) is None, name
        import mojax.kernels
        print(mojax.kernels.__file__.startswith(folder))
    """
    assert run(installed / "python", "-c", code, at=tmp_path) == "True\n"


def test_the_command_runs_outside_of_the_repository(installed, tmp_path):
    assert mojax.__version__ in run(installed / "mojax", "--version", at=tmp_path)
    assert mojax.__version__ in run(installed / "python", "-m", "mojax", "--version", at=tmp_path)
    menu = run(installed / "mojax", "recipes", at=tmp_path)
    assert all(name in menu for name in recipe.names())


def test_the_installed_command_quantizes(installed, tmp_path):
    flags = ("--model=tiny", "--recipe=fp8_dynamic", "--noevaluate", "--out=out")
    run(installed / "mojax", "quantize", *flags, at=tmp_path, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out.partial").exists()
