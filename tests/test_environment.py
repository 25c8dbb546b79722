"""`jaxllm collect-env`: that it says what is so, and no secret."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from serving import environment

ROOT = Path(__file__).parent.parent


def test_the_report():
    code = "import sys\nfrom serving.cli import main\nstatus = main(['collect-env'])\nassert 'jax' not in sys.modules\nsys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("jaxllm", "jax", "jaxlib", "flax"):
        assert f"\n  {name}: {importlib.metadata.version(name)}\n" in done.stdout
    assert f"  Python: {sys.version.split()[0]}" in done.stdout and "cores for this process" in done.stdout and " GiB\n" in done.stdout
    assert "\n  dev\n" in done.stdout and "GPU 0: " in done.stdout


def test_no_secret_is_shown():
    said = environment.variables(
        {
            "JAXLLM_API_KEY": "s1",
            "JAXLLM_SYSTEM_PROMPT": "s2",
            "HF_TOKEN": "s3",
            "XLA_SECRET": "s4",
            "OPENAI_API_KEY": "s5",
            "HF_ENDPOINT": "https://ann:s6@host/x",
            "NCCL_AUTH": "s7",
            "NVIDIA_X": "http://ann:s8@host/x",
            "JAX_PLATFORMS": "cpu",
            "JAXLLM_DTYPE": "float16",
        }
    )
    assert not any(f"s{i}" in value for i in range(1, 9) for value in said.values())
    assert said["JAX_PLATFORMS"] == "cpu" and said["JAXLLM_DTYPE"] == "float16" and said["HF_TOKEN"] == "(set)"
    assert "OPENAI_API_KEY" not in said and said["NVIDIA_X"] == "http://...@host/x"


class Metadata:
    """Two packages: `ours`, whose extra `gpu` is `theirs[cuda]`, which needs a plugin."""

    def __init__(self, *installed):
        self.installed = installed

    def requires(self, name):
        return {"ours": ["theirs", 'theirs[cuda]; extra == "gpu"', 'other>1; extra == "both"', 'theirs; extra == "both"']}.get(
            name, ['plugin>=2; extra == "cuda"'] if name == "theirs" else []
        )

    def metadata(self, name):
        return self

    def get_all(self, name):
        return ["gpu", "both"]


def test_an_extra_is_there_when_all_that_it_asks_for_is(monkeypatch):
    for installed, wanted in {("theirs",): [], ("theirs", "plugin"): ["gpu"], ("theirs", "other"): ["both"]}.items():
        found = Metadata(*installed)
        monkeypatch.setattr(environment, "metadata", found)
        monkeypatch.setattr(environment, "_version", lambda name, found=found: "1" if name in found.installed else None)
        assert environment.extras("ours") == wanted
