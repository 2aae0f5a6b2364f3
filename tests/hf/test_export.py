"""Modeling files beside the weights: the same model, in a process that has no flexmemory."""

import ast
import json
import shutil
import subprocess
import sys

import pytest
import torch

from flexmemory.hf.export import export_code
from flexmemory.model.checkpoint import Checkpoint
from tests.hf.conftest import MINI

WITHOUT_THE_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flexmemory", "jaxtyping", "beartype"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
folder, out = sys.argv[1:]
ids = torch.arange(12).view(2, 6)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
assert torch.equal(again(ids).logits, model(ids).logits)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tol="tol")
except ImportError as error:
    assert "pip install flexmemory" in str(error)
save_file({"logits": model(ids).logits.detach(), "generated": generated}, out + "/found.safetensors")
"""


def test_a_folder_runs_without_the_package(tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "model"
    shutil.copytree(MINI / "mini-flex3", folder)
    before = Checkpoint.open(folder)
    export_code(folder)
    after = Checkpoint.open(folder)
    after.verify()
    assert (after.config, after.fingerprint, after.tokenizer_fingerprint) == (
        before.config,
        before.fingerprint,
        before.tokenizer_fingerprint,
    )
    command = [sys.executable, "-W", "error", "-c", WITHOUT_THE_PACKAGE, str(folder), str(tmp_path / "saved")]
    subprocess.run(command, check=True, env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""})
    found = load_file(tmp_path / "saved" / "found.safetensors")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(found["logits"], after.load()(ids))
    assert found["generated"].shape == (2, 11)


def test_the_files_import_pytorch_and_transformers(tmp_path):
    shutil.copy(MINI / "mini-memory" / "config.json", tmp_path)
    export_code(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }
    for path in tmp_path.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = set()
        for node in tree.body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
        assert imported <= {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
        names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        assert len(names) == len(set(names)), "two modules define one name"


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        export_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"is of model_type 'llama', expected 'flex_memory'"):
        export_code(tmp_path)
