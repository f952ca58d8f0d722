"""A mount inside of a tree is taken off and what is mounted there is left alone."""

import subprocess
import sys
from pathlib import Path

_REMOVE = """
import subprocess, sys
from pathlib import Path
from skep.linux.trees import remove_tree

home = Path(sys.argv[1])
for inside in ("a", "d/" * 60 + "b", "file"):
    kept, target = home / "kept", home / "tree" / inside
    if inside == "file":
        target.touch()
        kept = kept / "content"
    else:
        target.mkdir(parents=True)
    for _ in range(2):
        subprocess.run(["mount", "--bind", str(kept), str(target)], check=True)
remove_tree(home / "tree")
"""


def test_what_is_mounted_inside_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "content").write_text("kept")
    (tmp_path / "tree").mkdir()
    command = ["unshare", "-m", "--propagation", "private", sys.executable, "-c", _REMOVE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "tree").exists()
    assert (tmp_path / "kept" / "content").read_text() == "kept"
