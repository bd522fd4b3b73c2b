"""What the first release wrote, read by this one: tests/data/layout-1 is never made anew.

run/      tests/programs/faulty.py --dir run --hidden 8 --fault kill@10 --commit-first; its checkpoint of step 8
sharded/  tests/programs/sharded.py, saved by two ranks
"""

import hashlib
import json
import shutil
from pathlib import Path

from support import event, losses, mlp

from trainer.checkpoint.contents import open_checkpoint
from trainer.checkpoint.reading import read
from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_checkpoints

DATA = Path(__file__).parent / "data" / "layout-1"


def digests(folder: Path) -> dict[str, str]:
    """Every tensor, whole, as a hash of its bytes."""
    opened = open_checkpoint(folder)
    boxes = {name: ((0,) * len(tensor.shape), tensor.shape) for name, tensor in opened.tensors.items()}
    found = read(opened, boxes, lambda file: True)
    return {
        name: hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + _bytes(tensor)).hexdigest()
        for name, tensor in sorted(found.items())
    }


def _bytes(tensor) -> bytes:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_every_tensor_is_as_it_was() -> None:
    expected = json.loads((DATA / "expected.json").read_text())
    folders = [*(DATA / "run" / "checkpoints").iterdir(), *(DATA / "sharded").iterdir()]
    assert {folder.name: digests(folder) for folder in folders} == expected


def test_the_run_goes_on_from_where_it_was(tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(DATA / "run", tmp_path / "run"))
    paths = RunPaths(run_dir)
    [name] = list_checkpoints(paths)
    assert read_manifest(paths.checkpoint(name)).step == 8
    ended = mlp(run_dir, "--hidden", "8")
    assert ended.code == 0, ended.output
    assert event(run_dir, "restored")["checkpoint"] == str(name)
    assert sorted(losses(run_dir)) == list(range(1, 13))
