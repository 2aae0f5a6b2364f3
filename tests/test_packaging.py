"""The wheel is clean, the import quick, the schema that of the code, the site without broken links."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
import pytest

from flexmemory.config import MODEL_TYPE, from_dict, to_dict
from flexmemory.config import ModelConfig as Config
from flexmemory.presets import PRESETS
from flexmemory.schema import model_schema
from tests.cli.conftest import REPOSITORY


def command(*args: str | Path, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_and_sdist_are_clean(tmp_path):
    command("-m", "hatchling", "build", "-d", tmp_path)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    command("-m", "twine", "check", "--strict", wheel, sdist)
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.split("/")[0] for name in names}
    assert inside == {"flexmemory", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    assert "flexmemory/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".safetensors"))]
    sources = {path.relative_to(REPOSITORY / "src").as_posix() for path in (REPOSITORY / "src").rglob("*.py")}
    assert sources <= set(names)


def test_importing_takes_nothing_beyond_the_standard_library():
    loaded = command(
        "-c", "import sys; before = set(sys.modules); import flexmemory; print(*set(sys.modules) - before)"
    )
    heavy = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "tyro"}
    assert "flexmemory" in loaded.split()
    assert not heavy & {name.split(".")[0] for name in loaded.split()}


def test_the_schema_is_that_of_the_code():
    path = REPOSITORY / "docs" / "config.schema.json"
    assert json.loads(path.read_text()) == model_schema(), f"write model_schema() to {path}"
    jsonschema.Draft202012Validator.check_schema(model_schema())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_configurations_of_presets_are_valid(name):
    jsonschema.validate({"model_type": MODEL_TYPE, **to_dict(PRESETS[name].model)}, model_schema())


@pytest.mark.parametrize(
    "change", [{"hidden_size": "64"}, {"num_layers": 0}, {"hiden_size": 64}, {"tie_embeddings": 1}, {"model_type": "x"}]
)
def test_what_the_code_refuses_the_schema_refuses(change):
    good = to_dict(PRESETS["nano-memory"].model)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model_type": MODEL_TYPE, **good, **change}, model_schema())
    if "model_type" not in change:
        with pytest.raises(ValueError, match=next(iter(change))):
            from_dict(Config, good | change)


def test_the_site_has_no_broken_links(tmp_path):
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    command("-m", "mkdocs", "build", "--strict", "--quiet", cwd=tmp_path)
    home = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis" not in home
    assert 'href="engine/"' in home
