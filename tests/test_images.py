"""What can be said of the images without building one: their recipe, their pins, and the builder's ways out."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.metadata import packages_distributions, requires
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = ROOT / "images" / "build"
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKER: Final = (
    "cli.py",
    "process.py",
    "audio",
    "engine/__init__.py",
    "engine/loopback.py",
    "wire",
    "worker",
)
# What runs in each image: below runtime/trunkline_runtime, or all of the operator.
CODE: Final = {
    "gateway": ("cli.py", "process.py", "gateway"),
    "operator": ("../../operator/trunkline_operator", "contract.py", "modal_app.py"),
    "worker-cpu": (*WORKER, "engine/speech"),
    "worker-moshi": (*WORKER, "engine/moshi"),
}
# Each image's extra in pyproject.toml; the gateway needs none.
EXTRAS: Final = {
    "gateway": "",
    "operator": "operator",
    "worker-cpu": "speech",
    "worker-moshi": "moshi",
}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, each on one line, without comments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "images" / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines()]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name; the last one has none."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = "before"
    for word, rest in instructions():
        if word == "FROM":
            name = rest.partition(" AS ")[2]
        found.setdefault(name, []).append((word, rest))
    return found


def pins(name: str) -> dict[str, str]:
    """The pinned packages of a requirements file; whatever else stands there fails."""
    found = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9][a-z0-9-]*)==([^\s;]+)( ; .+)?", line)
        assert match, f"requirements/{name}.txt: not a pin: {line!r}"
        found[match[1]] = match[2]
    return found


def wanted(image: str) -> set[str]:
    """The packages that pyproject.toml names for an image."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"].get(EXTRAS[image], [])]
    return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in lines}


@pytest.fixture
def builder() -> ModuleType:
    """images/build as a module."""
    loader = SourceFileLoader("trunkline_images_build", str(BUILD))
    spec = spec_from_loader(loader.name, loader)
    assert spec
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = keep
        del sys.modules[loader.name]
    return module


# --- the recipe


def test_every_stage_starts_from_the_base_that_is_given_or_from_another_stage() -> None:
    known = {"${BASE}", "${IMAGE}"}
    for word, rest in instructions():
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            assert source in known, f"FROM {rest}"
            known.add(name)


def test_the_base_is_pinned_and_has_the_python_of_the_pins(builder: ModuleType) -> None:
    base = builder.default_base(builder.DOCKERFILE.read_text())
    assert re.fullmatch(
        r"docker\.io/library/python:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", base
    )
    assert builder.PYTHON == "3.11"


def test_nothing_is_fetched_while_an_image_is_built() -> None:
    assert "ADD" not in {word for word, _ in instructions()}
    for word, rest in instructions():
        if word == "RUN":
            assert not re.search(r"curl|wget|apt-get|https?:|git clone", rest), rest
            assert "pip" not in rest.split() or "--no-index" in rest.split(), rest


def test_no_image_takes_a_secret() -> None:
    for word, rest in instructions():
        if word in ("ARG", "ENV", "LABEL"):
            assert not re.search(
                r"token|secret|passw|credential|index.url|_key", rest, re.IGNORECASE
            ), rest
        assert "type=secret" not in rest
        assert "type=ssh" not in rest


def test_only_pins_and_wheels_are_sent_to_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert set(rules[1:]) == {"!requirements/*.txt", "!build/wheels"}


def test_every_image_runs_as_a_user_without_rights_and_ends_by_sigterm() -> None:
    assert ("USER", "10001:10001") in stages()["assembled"]
    assert ("STOPSIGNAL", "SIGTERM") in stages()["assembled"]
    assert [rest for word, rest in instructions() if word == "USER"] == ["10001:10001"]


def test_no_image_has_the_tools_that_built_it() -> None:
    (installing,) = [rest for word, rest in stages()["packages"] if word == "RUN"]
    assert "venv --without-pip /opt/trunkline" in installing
    assert installing.startswith("--mount=type=bind,source=build/wheels,")  # pip and the wheels
    assert "--no-cache-dir" in installing
    copies = {rest for word, rest in stages()["assembled"] if word == "COPY"}
    assert copies == {"--from=code /code/opt/trunkline /opt/trunkline"}
    assert "RUN" not in {word for word, _ in stages()["assembled"]}
    assert "RUN" not in {word for image in EXTRAS for word, _ in stages()[image]}


def test_every_image_has_a_stage_pins_and_an_entry_point_of_the_project(
    builder: ModuleType,
) -> None:
    assert set(builder.IMAGES) == set(EXTRAS)
    for image in builder.IMAGES:
        stage = dict(stages()[image])
        assert stage["FROM"] == f"assembled AS {image}"
        program = re.match(r'\["([a-z-]+)"', stage["ENTRYPOINT"])
        assert program, image
        assert program[1] in PROJECT["project"]["scripts"]
        assert (ROOT / "requirements" / f"{image}.txt").is_file()


def test_no_program_of_an_image_raises_its_rights_or_reports_on_its_user() -> None:
    base = stages()["base"]
    assert any("-perm /6000 -exec chmod a-s" in rest for word, rest in base if word == "RUN")
    (variables,) = [rest.split() for word, rest in base if word == "ENV"]
    assert {"ORT_DISABLE_TELEMETRY=1", "HF_HUB_DISABLE_TELEMETRY=1", "HOME=/tmp"} <= {*variables}


def test_the_images_are_those_that_the_chart_installs(builder: ModuleType) -> None:
    chart = yaml.safe_load((ROOT / "charts" / "trunkline" / "Chart.yaml").read_text())
    values = yaml.safe_load((ROOT / "charts" / "trunkline" / "values.yaml").read_text())
    assert values["image"]["registry"] == builder.REGISTRY
    assert builder.version() == chart["appVersion"]
    installed = [values[part]["image"] for part in ("gateway", "operator", "worker")]
    assert installed == list(builder.BY_DEFAULT)


def test_an_image_says_what_it_was_made_from(builder: ModuleType, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    builder.build(recording_tool(builder, asked), "gateway", "here/gateway:1", "mine:1")
    words = asked.read_text().splitlines()
    assert f"--build-arg=VERSION={builder.version()}" in words
    (revision,) = [word for word in words if "=REVISION=" in word]
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?|unknown)", revision.rpartition("=")[2])
    assert {"here/gateway:1", "--build-arg=IMAGE=gateway", "--build-arg=BASE=mine:1"} <= {*words}
    fixed = " ".join(rest for word, rest in instructions() if word == "LABEL")
    for label in ("title", "description", "url", "source", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in fixed
    # A label that is given as a flag makes another image each time, in buildah at least.
    assert not any(word.startswith("--label") for word in words)


# --- the pins


@pytest.mark.parametrize("image", EXTRAS)
def test_an_image_has_what_it_needs_in_the_versions_that_are_tested(image: str) -> None:
    pinned, tested = pins(image), pins("dev")
    assert wanted(image) <= pinned.keys()
    assert {name: pinned[name] for name in pinned} == {name: tested.get(name) for name in pinned}


def needs(package: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What a package that is installed here asks for on this machine, with the given extras."""
    for line in requires(package) or ():
        need = Requirement(line)
        marker = need.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield need


@pytest.mark.parametrize("image", EXTRAS)
def test_pins_are_whole_since_pip_adds_nothing_to_them(image: str) -> None:
    pinned = pins(image)
    todo = [(name, frozenset[str]()) for name in pinned]
    seen = set(todo)
    while todo:
        package, extras = todo.pop()
        for need in needs(package, extras):
            name = canonicalize_name(need.name)
            assert name in pinned, f"{package} needs {need}"
            if (package, name) != ("moshi", "aiohttp"):  # `override-dependencies` in pyproject.toml
                assert need.specifier.contains(pinned[name]), f"{package} needs {need}"
            further = (name, frozenset(need.extras))
            if further not in seen:
                seen.add(further)
                todo.append(further)


def imported(path: Path) -> set[str]:
    """The top-level names that a module imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("image", EXTRAS)
def test_what_an_images_code_imports_is_in_it(image: str) -> None:
    owners, pinned = packages_distributions(), pins(image)
    known = {*sys.stdlib_module_names, "trunkline_runtime", "trunkline_operator"}
    modules = [
        module
        for place in CODE[image]
        for path in [ROOT / "runtime" / "trunkline_runtime" / place]
        for module in ([path] if path.suffix else sorted(path.rglob("*.py")))
        # For people at their own machines; no pod runs it.
        if "simulation" not in module.parts
    ]
    assert len(modules) > len(CODE[image])
    for module in modules:
        for name in imported(module) - known:
            packages = {canonicalize_name(owner) for owner in owners[name]}
            assert packages & pinned.keys(), f"{module.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("image", EXTRAS)
def test_pins_name_no_host(image: str) -> None:
    text = (ROOT / "requirements" / f"{image}.txt").read_text()
    assert "//" not in text
    assert "--index" not in text.replace("# ", "")


def test_no_image_has_what_another_is_for() -> None:
    assert not {"torch", "modal", "kopf", "numpy", "kubernetes"} & pins("gateway").keys()
    assert not {"torch", "numpy", "ctranslate2"} & pins("operator").keys()
    assert not {"torch", "modal", "kopf", "kubernetes"} & pins("worker-cpu").keys()
    assert not {"modal", "kopf", "kubernetes"} & pins("worker-moshi").keys()


# --- the builder


def run_build(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": os.environ["PATH"] if path is None else path}
    command = [sys.executable, str(BUILD), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_help_shows_examples() -> None:
    done = run_build("--help")
    assert done.returncode == 0
    assert "images/build gateway --output /tmp/images" in done.stdout


def test_an_image_that_is_not_ours_is_named_with_those_that_are() -> None:
    done = run_build("gatway")
    assert done.returncode == 2
    assert "'gatway' is not one of gateway, operator, worker-cpu, worker-moshi" in done.stderr


def test_a_machine_without_a_builder_is_told_what_to_install(tmp_path: Path) -> None:
    done = run_build("gateway", "--output", str(tmp_path / "out"), path=str(tmp_path))
    assert done.returncode == 3
    assert "buildah or podman or docker does not answer here" in done.stderr
    assert "`apt-get install --no-install-recommends buildah debootstrap`" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_machine_that_cannot_install_is_told_so(tmp_path: Path) -> None:
    done = run_build("gateway", "--install", path=str(tmp_path))
    assert done.returncode == 3
    assert "--install needs root and apt-get: install buildah" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_what_is_missing_is_installed_when_asked(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("env", "sh", "chmod", "cat"):
        where = shutil.which(program)
        assert where
        (tmp_path / program).symlink_to(where)
    script(tmp_path / "buildah.deb", '[ "$1" = info ]')
    script(
        tmp_path / "apt-get",
        f'echo "$*" >> {tmp_path}/asked; case "$*" in *install*buildah)'
        f" cat {tmp_path}/buildah.deb > {tmp_path}/buildah; chmod +x {tmp_path}/buildah;; esac",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(builder.CannotBuild, match="--install"):
        builder.find_tool(None, install=False)
    assert not (tmp_path / "asked").exists()
    assert builder.find_tool(None, install=True).name == "buildah"
    assert [line.split()[3] for line in (tmp_path / "asked").read_text().splitlines()] == [
        "update",
        "install",
    ]


def script(path: Path, text: str) -> None:
    """A program of the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def recording_tool(builder: ModuleType, path: Path) -> object:
    """A tool whose build writes its arguments to a file, a line each."""
    command = ("sh", "-c", f'printf "%s\\n" "$@" > {path}', "sh")
    return dataclasses.replace(shell_tool(builder), build=command)


def shell_tool(builder: ModuleType, *, identify: str = "echo one", pull: str = "false") -> Any:
    """A tool whose commands are small programs of the shell; an archive fails while `broken` exists."""
    return builder.Tool(
        name="sh",
        build=("sh", "-c", "exit 1"),
        pull=("sh", "-c", pull),
        identify=("sh", "-c", identify, "sh"),
        archive=lambda image, path: (
            "sh", "-c", 'echo "$0" >> "$1"; ! test -e "${1%/*}/broken"', image, str(path),
        ),
    )  # fmt: skip


def test_a_second_build_in_the_same_folder_is_refused(builder: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    refused = pytest.raises(builder.CannotBuild, match="another images/build")
    with builder.alone(lock), refused, builder.alone(lock):
        pass
    with builder.alone(lock):
        pass


def test_an_archive_that_fails_leaves_the_last_whole_one(
    builder: ModuleType, tmp_path: Path
) -> None:
    archive, first = tmp_path / "gateway.tar", shell_tool(builder)
    builder.save(first, "gateway:1", archive)
    (tmp_path / "broken").touch()
    with pytest.raises(builder.CannotBuild, match="ended with 1"):
        builder.save(shell_tool(builder, identify="echo two"), "gateway:2", archive)
    assert archive.read_text() == "gateway:1\n"
    assert not list(tmp_path.glob("*.part"))

    (tmp_path / "broken").unlink()
    builder.save(shell_tool(builder, identify="echo two"), "gateway:2", archive)
    assert archive.read_text() == "gateway:2\n"


def test_an_archive_of_the_same_image_is_not_written_again(
    builder: ModuleType, tmp_path: Path
) -> None:
    archive, tool = tmp_path / "gateway.tar", shell_tool(builder)
    builder.save(tool, "gateway:1", archive)
    (tmp_path / "broken").touch()  # writing would fail
    builder.save(tool, "gateway:1", archive)
    assert archive.read_text() == "gateway:1\n"


def test_the_base_is_the_one_given_else_the_usual_else_our_own(builder: ModuleType) -> None:
    usual = builder.default_base(builder.DOCKERFILE.read_text())
    own_is_here = f'test "$1" = {builder.OWN_BASE}'
    assert builder.find_base(shell_tool(builder), "mine:1", install=False) == "mine:1"
    assert builder.find_base(shell_tool(builder, identify="true"), "", install=False) == usual
    assert (
        builder.find_base(shell_tool(builder, identify=own_is_here), "", install=False)
        == builder.OWN_BASE
    )
    assert (
        builder.find_base(shell_tool(builder, identify="false", pull="true"), "", install=False)
        == usual
    )


def test_a_folder_of_wheels_is_filled_again_until_it_is_whole(
    builder: ModuleType, tmp_path: Path
) -> None:
    folder, source = tmp_path / "wheels", tmp_path / "source"
    download = ("download", "--no-index", "--find-links", str(source), "--dest")
    source.mkdir()
    for _ in range(2):
        with pytest.raises(builder.CannotBuild, match="tiny"):
            builder.fill(folder, "tiny", *download, given="tiny==1")
        assert not folder.with_suffix(".stamp").exists()

    wheel = tiny_wheel(source)
    builder.fill(folder, "tiny", *download, given="tiny==1")
    assert [path.name for path in folder.iterdir()] == [wheel.name]

    wheel.unlink()  # fetching again would fail
    builder.fill(folder, "tiny", *download, given="tiny==1")
    with pytest.raises(builder.CannotBuild, match="tiny==2"):
        builder.fill(folder, "tiny", *download, given="tiny==2")


def tiny_wheel(folder: Path) -> Path:
    path, info = folder / "tiny-1-py3-none-any.whl", "tiny-1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_the_base_says_nothing_of_the_machine_that_made_it(builder: ModuleType) -> None:
    left_out = {"etc/apt/sources.list", "etc/hostname", "etc/resolv.conf"}
    assert left_out <= {*builder.BASE_LEAVES_OUT}
