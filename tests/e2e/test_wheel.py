"""What is shipped: only packages of ours, data files included."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_our_packages_and_nothing_else(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT], check=True,
                   capture_output=True)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "moeforge", "moeforge_kernels", *(p.name for p in (ROOT / "plugins").glob("moeforge_*")),
    }  # fmt: skip
    assert "moeforge/builtins.toml" in names
    assert any(name.startswith("moeforge/checkpoint/architectures/") and name.endswith(".json") for name in names)
