"""Checkpoints in one process: what comes back is what was saved, and whatever else is in the bucket harms nobody."""

import json
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.bucket.hashing import hash_file
from trainer.checkpoint import restore, state, writing
from trainer.checkpoint.contents import open_checkpoint
from trainer.checkpoint.damage import DamagedError
from trainer.checkpoint.shards import Part, deal, local, parts_of
from trainer.layout.documents import LayoutError, LayoutVersionError, sealed
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import MANIFEST, STATE, CheckpointName, RunPaths

NAME = "0000000002-a0001-0000ff-1"


class Odd(nn.Module):
    """All kinds of parameters and buffers that a model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.every_other = nn.Parameter(torch.arange(10.0)[::2])
        self.zero_d = nn.Parameter(torch.tensor(2.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.bf16 = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float64):
            self.register_buffer(str(dtype).replace(".", "_"), torch.tensor([0, 1], dtype=dtype))


def collected(model: nn.Module, optimizers: list[torch.optim.Optimizer], extra: dict | None = None) -> state.State:
    return state.collect(model, optimizers, {"step": 2, "scale": float("inf"), "pair": (1, None)}, extra)


def made(fill: float) -> tuple[Odd, list[torch.optim.Optimizer], dict]:
    """A model after a step of two optimizers, and its moving average."""
    torch.manual_seed(int(fill))
    model = Odd()
    parameters = list(model.parameters())
    optimizers = [torch.optim.AdamW(parameters[:3], lr=fill), torch.optim.SGD(parameters[3:], lr=fill, momentum=0.9)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, fill)
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers, {"ema": {name: value.detach() * fill for name, value in model.named_parameters()}}


def write(folder: Path, live: state.State, ranks: int = 1) -> Path:
    """A committed checkpoint."""
    folder.mkdir(parents=True)
    files = {}
    for rank, share in enumerate(deal(parts_of(live.tensors, ranks, live.buffers), ranks)):
        path = folder / writing.share_name(rank)
        files[path.name] = writing.write_share(path, share, lambda part: local(live.tensors[part.name]).contiguous())
    files[STATE] = writing.write_state(folder, live.plain)
    writing.write_manifest(folder, Manifest("checkpoint", files, {"step": 2}))
    return folder


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_comes_back_is_what_was_saved(tmp_path: Path, ranks: int) -> None:
    model, optimizers, extra = made(1.0)
    live = collected(model, optimizers, extra)
    kept = {name: tensor.detach().clone() for name, tensor in live.tensors.items()}
    folder = write(tmp_path / NAME, live, ranks)
    model, optimizers, _ = made(3.0)
    loaded = restore.load(folder, collected(model, optimizers))
    counters, extra = state.apply(model, optimizers, loaded.tensors, loaded.plain)
    assert counters == {"step": 2, "scale": float("inf"), "pair": (1, None)}
    again = collected(model, optimizers, extra).tensors
    assert again.keys() == kept.keys()
    for name, tensor in kept.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name
    assert model.head.weight is model.embed.weight


class Seat:
    """A rank's seat, as far as the restore looks at it."""

    def __init__(self, rank: int, unsupervised: bool) -> None:
        self.rank, self.world_size, self.unsupervised = rank, 2, unsupervised


@pytest.mark.parametrize(
    ("seat", "patience_s", "found"),
    [
        (Seat(1, True), 60.0, True),
        (Seat(1, True), 0.0, False),
        (Seat(0, True), 60.0, False),  # Who saw it there, and sees it no more, saw it pruned.
        (Seat(1, False), 60.0, False),
    ],
)
def test_another_machines_mount_may_show_a_checkpoint_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seat: Seat, patience_s: float, found: bool
) -> None:
    monkeypatch.setattr(restore, "UNSEEN_S", patience_s)
    paths, name = RunPaths(tmp_path / "run"), CheckpointName.parse(NAME)
    model, optimizers, _ = made(1.0)
    live = collected(model, optimizers)
    aside, folder = write(tmp_path / NAME, live, 2), paths.checkpoint(name)
    folder.parent.mkdir(parents=True)
    waits: list[None] = []

    def check_stop() -> None:  # Called while it waits.
        waits.append(None)
        if not folder.exists():
            aside.rename(folder)

    loaded, reason, code = restore._try_load(seat, paths, name, live, check_stop, None)
    assert code is None
    assert bool(waits) == found
    assert (reason is None) == found == (loaded is not None), reason
    if not found:
        assert reason == "gone"


def test_ranks_share_what_all_of_them_hold_and_nobody_writes_twice() -> None:
    tensors = {f"{number:02d}": torch.empty(number + 1, 100) for number in range(40)}
    shares = deal(parts_of(tensors, 4, rank0={"03"}), 4)
    assert sorted(part.name for share in shares for part in share) == sorted(tensors)
    filled = [sum(part.bytes for part in share) for share in shares]
    assert max(filled) - min(filled) <= max(part.bytes for share in shares for part in share)
    assert "03" in {part.name for part in shares[0]}


def test_a_share_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, optimizers, _ = made(1.0)
    live = collected(model, optimizers)
    folder = write(tmp_path / NAME, live)
    found = safetensors.load_file(folder / writing.share_name(0))
    assert found.keys() == live.tensors.keys()
    assert all(torch.equal(found[name], tensor.detach()) for name, tensor in live.tensors.items())


# -- what an attacker, or a disk, may have left there ------------------------------------------------------------------


def harmless(folder: Path, live: state.State) -> str:
    """Load whatever is there; only refusals may come of it."""
    try:
        restore.load(folder, live)
        return "loaded"
    except (DamagedError, LayoutError, LayoutVersionError, state.StateError) as error:
        assert len(str(error)) < 1000
        return "refused"


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Put a file in the place of another, and make the manifest agree: what somebody does who may write there."""
    (folder / name).write_bytes(data)
    if name != MANIFEST:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        del manifest["seal"]
        manifest["files"][name] = {"bytes": len(data), "hash": hash_file(folder / name)}
        (folder / MANIFEST).write_text(json.dumps(manifest))


def header(edit: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    """A share whose header was edited."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        document = json.loads(data[8 : 8 + length])
        edit(document)
        text = json.dumps(document).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return change


def tensor(**fields: object) -> Callable[[bytes], bytes]:
    return header(lambda document: document["model.bf16"].update(fields))


def manifest(**fields: object) -> Callable[[bytes], bytes]:
    return lambda data: sealed({**json.loads(data), **fields})


def test_parts_that_overlap_are_not_put_together(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    whole = torch.arange(4.0)
    for rank, (start, end) in enumerate([(0, 2), (1, 3)]):  # As many elements as the whole has; the last is in none.
        part = Part("model.w", whole.dtype, (4,), (start,), (end - start,), (rank,))
        writing.write_share(folder / writing.share_name(rank), [part], lambda part: whole[: part.sizes[0]].clone())
    files = {path.name: FileRecord(path.stat().st_size, hash_file(path)) for path in folder.iterdir()}
    files[STATE] = writing.write_state(folder, {})
    writing.write_manifest(folder, Manifest("checkpoint", files, {"step": 2}))
    with pytest.raises(DamagedError, match="do not cover the tensor exactly once"):
        open_checkpoint(folder)


@pytest.mark.parametrize("depth", range(900, 1001, 4))
def test_a_manifest_that_is_nested_about_as_deep_as_python_goes_is_refused(depth: int) -> None:
    data = (
        b'{"layout_version": 1, "kind": "checkpoint", "files": {}, "seal": "x", "deep": ' + b"[" * depth + b"]" * depth
    )
    with pytest.raises(LayoutError):
        Manifest.parse(data + b"}")


DEEP = b"[" * 100_000 + b"]" * 100_000
SHARE = writing.share_name(0)
HOSTILE = {
    "shape-huge": (SHARE, tensor(shape=[10**18])),
    "shape-huge-zero": (SHARE, tensor(shape=[10**18, 0], data_offsets=[0, 0])),
    "shape-nothing-of-much": (
        SHARE,
        header(lambda document: document.update(
            {"model.more": {"dtype": "F32", "shape": [1 << 61, 1 << 61, 0], "data_offsets": [0, 0]}})),
    ),
    "metrics-text": (MANIFEST, manifest(metrics="all")),
    "metrics-without-steps": (MANIFEST, manifest(metrics=[{"path": "attempts/x"}])),
    "metrics-outside": (
        MANIFEST,
        manifest(metrics=[{"path": "../x", "bytes": 1, "hash": "0", "first_step": 1, "last_step": 2}]),
    ),
    "state-no-optimizer": (STATE, lambda data: data.replace(b'"groups"', b'"other"')),
    "shape-negative": (SHARE, tensor(shape=[-2])),
    "shape-bool": (SHARE, tensor(shape=[True, 2])),
    "shape-float": (SHARE, tensor(shape=[2.0])),
    "shape-text": (SHARE, tensor(shape="ab")),
    "shape-many": (SHARE, tensor(shape=[1] * 10_000)),
    "dtype-unknown": (SHARE, tensor(dtype="OBJECT")),
    "dtype-list": (SHARE, tensor(dtype=["F32"])),
    "offsets-outside": (SHARE, tensor(data_offsets=[0, 10**18])),
    "offsets-swapped": (SHARE, tensor(data_offsets=[4, 0])),
    "offsets-overlap": (SHARE, tensor(data_offsets=[0, 4])),
    "offsets-three": (SHARE, tensor(data_offsets=[0, 1, 2])),
    "entry-null": (SHARE, header(lambda document: document.update({"model.bf16": None}))),
    "metadata-list": (SHARE, header(lambda document: document.update({"__metadata__": []}))),
    "parts-not-json": (SHARE, header(lambda document: document.update({"__metadata__": {"parts": "{"}}))),
    "parts-deep": (SHARE, header(lambda document: document.update({"__metadata__": {"parts": DEEP.decode()}}))),
    "part-outside": (
        SHARE,
        header(lambda document: document.update({"__metadata__": {"parts": '{"model.bf16": [[3], [2]]}'}})),
    ),
    "part-of-more": (
        SHARE,
        header(lambda document: document.update({"__metadata__": {"parts": '{"model.bf16": [[4], [0]]}'}})),
    ),
    "state-huge": (
        MANIFEST,
        lambda data: sealed({**json.loads(data), "files": {**json.loads(data)["files"],
                             "state.json": {"bytes": 1 << 42, "hash": "0" * 32}}}),
    ),
    "header-longer-than-file": (SHARE, lambda data: (1 << 62).to_bytes(8, "little") + data[8:]),
    "header-deep": (SHARE, lambda data: len(DEEP).to_bytes(8, "little") + DEEP),
    "header-list": (SHARE, lambda data: (2).to_bytes(8, "little") + b"[]" + data),
    "share-empty": (SHARE, lambda data: b""),
    "share-pickle": (SHARE, lambda data: b"\x80\x04cos\nsystem\n"),
    "state-deep": (STATE, lambda data: DEEP),
    "state-deep-dict": (STATE, lambda data: b'{"dict":[[1,' * 300 + b"1" + b"]]}" * 300),
    "state-nan": (STATE, lambda data: b'{"counters": NaN}'),
    "state-twin": (STATE, lambda data: b'{"counters": 1, "counters": 2}'),
    "state-list": (STATE, lambda data: b"[]"),
    "state-other-tag": (STATE, lambda data: b'{"optim": {"exec": "x"}, "counters": {"dict": []}}'),
    "state-nothing": (STATE, lambda data: b"{}"),
    "state-latin-1": (STATE, lambda data: b'{"\xe9": 1}'),
    "manifest-outside": (MANIFEST, manifest(files={"../../etc/passwd": {"bytes": 1, "hash": "0" * 32}})),
    "manifest-absolute": (MANIFEST, manifest(files={"/etc/passwd": {"bytes": 1, "hash": "0" * 32}})),
    "manifest-huge": (MANIFEST, manifest(files={"state.json": {"bytes": 10**18, "hash": "0" * 32}})),
    "manifest-large": (MANIFEST, manifest(files={"state.json": {"bytes": 1 << 49, "hash": "0" * 32}})),
    "manifest-deep": (MANIFEST, lambda data: DEEP),
    "manifest-nan": (MANIFEST, lambda data: data.replace(b'"step": 2', b'"step": NaN')),
    "manifest-twin": (MANIFEST, lambda data: data.replace(b'"step": 2', b'"step": 2, "step": 3')),
    "manifest-no-state": (MANIFEST, manifest(files={})),
    "manifest-newer": (MANIFEST, manifest(layout_version=2)),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_a_checkpoint_is_refused(tmp_path: Path, what: str) -> None:
    model, optimizers, _ = made(1.0)
    live = collected(model, optimizers)
    folder = write(tmp_path / NAME, live)
    name, change = HOSTILE[what]
    rewrite(folder, name, change((folder / name).read_bytes()))
    loaded = None
    try:
        loaded = restore.load(folder, live)
        state.apply(model, optimizers, loaded.tensors, loaded.plain)
    except (DamagedError, LayoutError, LayoutVersionError, state.StateError):
        return
    pytest.fail(f"{what} was taken for a checkpoint: {loaded}")


def test_bytes_changed_at_random_by_somebody_who_can_hash_harm_nobody(tmp_path: Path) -> None:
    model, optimizers, extra = made(1.0)
    live = collected(model, optimizers, extra)
    folder = write(tmp_path / NAME, live, 2)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    draw = random.Random(5)
    ends = {"loaded": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(400):
        name = draw.choice(sorted(whole))
        data = bytearray(whole[name])
        for _ in range(draw.choice([1, 1, 2, 20])):
            # Most of a share is numbers, of which any will do: what decides is in front.
            place = draw.randrange(min(len(data), 2000))
            data[place] = draw.choice([draw.randrange(256), *b'0123456789-.,:[]{}"e'])
        cut = draw.choice([len(data)] * 6 + [draw.randrange(len(data))])
        rewrite(folder, name, bytes(data[:cut]))
        ends[harmless(folder, live)] += 1
        for other, contents in whole.items():
            (folder / other).write_bytes(contents)
    assert min(ends.values()) > 20, ends
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB: no size was believed.


@pytest.mark.parametrize("name", [SHARE, STATE])
def test_a_single_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    model, optimizers, _ = made(1.0)
    live = collected(model, optimizers)
    folder = write(tmp_path / NAME, live)
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DamagedError, match=f"{name}.* does not match the hash in its manifest"):
        restore.load(folder, live)


def test_a_share_that_nobody_wants_is_hashed_all_the_same(tmp_path: Path) -> None:
    model, optimizers, _ = made(1.0)
    live = collected(model, optimizers)
    folder = write(tmp_path / NAME, live)
    path = folder / writing.share_name(1)
    stream = {"rng.7": torch.zeros(100, dtype=torch.uint8)}  # Of a rank that is not there any more.
    written = json.loads((folder / MANIFEST).read_bytes())
    del written["seal"]
    record: FileRecord = writing.write_tensors(path, stream)
    written["files"][path.name] = {"bytes": record.bytes, "hash": record.hash}
    (folder / MANIFEST).write_text(json.dumps(written))
    restore.load(folder, live)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "rng.7" in open_checkpoint(folder).tensors
    with pytest.raises(DamagedError, match="does not match the hash"):
        restore.load(folder, live)
