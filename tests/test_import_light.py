"""`import kvedit` does no work: heavy libraries load on first use of a name that needs them."""

import json
import subprocess
import sys

import kvedit

HEAVY = ("accelerate", "hydra", "matplotlib", "transformers", "wandb")

PROBE = """
import json, sys
import kvedit
names = dir(kvedit)
print(json.dumps({"modules": sorted(sys.modules), "dir": names, "all": list(kvedit.__all__)}))
"""


def probe() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_and_dir_load_nothing_heavy():
    loaded = probe()["modules"]
    assert [name for name in HEAVY if name in loaded] == []


def test_dir_lists_the_public_names():
    seen = probe()
    assert seen["all"], "kvedit.__all__ is empty"
    assert set(seen["all"]) <= set(seen["dir"])


def test_every_public_name_resolves():
    assert len(set(kvedit.__all__)) == len(kvedit.__all__)
    unresolved = [name for name in kvedit.__all__ if getattr(kvedit, name, None) is None]
    assert unresolved == []
