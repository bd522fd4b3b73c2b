"""What is true of each script beside this file; tests/test_scripts.py finds it out without skyspot.

A script reads its folder from $OUT. What it does wrong, if anything, is in its docstring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent

# -- verdicts, of a script and of a kind of strike
EXACT = "exact"
LOST_WORK = "LOST WORK"
"""Started from nothing though a checkpoint was there; the result may be the same."""
NOT_EXACT = "NOT exact"
STAYS_DOWN = "stays down"
"""It does not go on without a person's hand."""
NOT_CHECKED = "not checked"
"""Nothing can be said of its resume, so it is no proof."""

# -- causes
DATA_ORDER = "data order"
OPTIMIZER = "optimizer file not read"
LEARNING_RATE = "LR"
MORE_STEPS = "trains more steps than asked"
FEWER_STEPS = "trains fewer steps than asked"
OLDER = "went on from an older checkpoint"
BEST_LOST = "the best score so far was lost"
NOT_USED = "checkpoint read and not used"
NO_CHECKPOINT = "no checkpoint before the end"
MIXED = "mixed pair of files of two saves"
HALF = "half-written file"
AT_NOTICE = "saved at SIGTERM in the middle of an epoch"
RNG_IGNORED = "RNG file missing and ignored"
WORKERS = "loader workers died of SIGTERM"
NOT_REPRODUCIBLE = "not reproducible by itself"
ENDLESS = "does not end"
ONE_SLOT = "saves take turns between files, and one of these is wrong"
DELETED = "deleted before the next was written"
UNNAMED = "results differ, no cause named"

# -- kinds of strike
KILL, NOTICE, SIGTERM, IN_SAVE, AT_WRITE, TORN = KINDS = (
    "kill", "aws-notice", "sigterm", "kill-in-save", "kill-at-write", "torn",
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """A strike at an exact moment, and what comes of it."""

    kind: str
    """The kind of strike that it is an example of."""
    line: str
    """A text that one line of the script holds. The strike falls before that line is run."""
    times: int
    """... for this many times."""
    then: str
    """The verdict that the next attempt shows. `NOT_CHECKED`: there was no checkpoint, it starts from nothing."""
    signal: str = "SIGKILL"
    cut: str = ""
    """This file loses its second half, as it does when the machine goes in the middle of writing it."""


@dataclass(frozen=True)
class Truth:
    """What is true of a script."""

    script: str
    """Its name without .py."""
    verdict: str
    """The worst that can come of it."""
    why: str
    result: str = "result.json"
    """What its user would compare (`--compare`)."""
    fails: Mapping[str, str] = field(default_factory=dict)
    """Verdict by kind of strike that can show its fault; the others are exact. None of `NOT_CHECKED`."""
    cause: str = ""
    files: tuple[str, ...] = ()
    """The files to be named, below $OUT; # stands for a number."""
    options: tuple[str, ...] = ()
    """What else its user would say."""
    show: tuple[str, ...] = ()
    """What shows its fault in a short rehearsal: kinds of strike, few of them. Empty: the default five."""
    refused_on: tuple[str, ...] = ()
    """Kinds of mount that refuse what it does, be it in the second attempt."""
    wrong_on: tuple[str, ...] = ()
    """Kinds of mount on which it is wrong, though it is right on a local file system."""
    moments: tuple[Moment, ...] = ()
    """The first one shows the fault."""
    cure: tuple[tuple[str, str], ...] = ()
    """Texts and what they are replaced by, so that the first moment is survived exactly: the proof of the cause."""

    @property
    def path(self) -> Path:
        """The script."""
        return HERE / f"{self.script}.py"


def always(verdict: str) -> dict[str, str]:
    """It shows after every strike that a checkpoint came before."""
    return dict.fromkeys(KINDS, verdict)


def few(*kinds: str) -> tuple[str, ...]:
    """The options of a short rehearsal: a strike of each of these kinds."""
    return ("--kinds", ",".join(kinds), "--preemptions", str(len(kinds)))


def step(done: int, then: str, kind: str = KILL, **more: str) -> Moment:
    """A strike in the step after so many; a save after this many is over."""
    return Moment(kind, "time.sleep(", done + 1, then, **more)


TRUTHS = (
    Truth(
        "reseeded_order", NOT_EXACT,
        "The generator of the batches is seeded anew, so a resumed run sees the first batches again.",
        fails=always(NOT_EXACT), cause=DATA_ORDER, files=("checkpoint.pkl",),
        moments=(step(40, NOT_EXACT), step(10, NOT_EXACT, SIGTERM, signal="SIGTERM")),
        cure=(("starts = rng.integers(", "starts = np.random.default_rng(step).integers("),),
        show=few(IN_SAVE),
    ),
    Truth(
        "optimizer_lost", NOT_EXACT,
        "optimizer.pt is written at each save and never read: AdamW goes on without its moments.",
        "final.pt", fails=always(NOT_EXACT), cause=OPTIMIZER, files=("optimizer.pt",), moments=(step(40, NOT_EXACT),),
        cure=(
            (
                '        start = saved["step"]\n',
                '        start = saved["step"]\n        optimizer.load_state_dict(torch.load(out / "optimizer.pt"))\n',
            ),
        ),
        show=few(IN_SAVE),
    ),
    Truth(
        "scheduler_lost", NOT_EXACT,
        "The scheduler's state is not saved, so the cosine starts again: the learning rates in the metrics differ.",
        fails=always(NOT_EXACT), cause=LEARNING_RATE, files=("last.pt",), moments=(step(40, NOT_EXACT),),
        cure=(
            ('state = {"step": step,', 'state = {"step": step, "scheduler": scheduler.state_dict(),'),
            (
                '    first_step = checkpoint["step"]\n',
                '    first_step = checkpoint["step"]\n    scheduler.load_state_dict(checkpoint["scheduler"])\n',
            ),
        ),
        show=few(IN_SAVE),
    ),
    Truth(
        "epoch_repeated", NOT_EXACT,
        "A restart begins the epoch of the checkpoint at its first batch: the numbers of its steps go beyond 100.",
        fails=always(NOT_EXACT), cause=MORE_STEPS, files=("checkpoints/step_#.pkl",),
        moments=(step(30, NOT_EXACT), step(50, NOT_EXACT)),
        cure=(("order.reshape(-1, BATCH):", "order.reshape(-1, BATCH)[self.global_step - 25 * self.epoch :]:"),),
        show=few(IN_SAVE),
    ),
    Truth(
        "trains_n_more", NOT_EXACT,
        "The loop runs 90 rounds in each process. One that resumes after 40 plays 130 in all.",
        fails=always(NOT_EXACT), cause=MORE_STEPS, files=("table.json",), moments=(step(40, NOT_EXACT),),
        cure=(("range(args.rounds):", "range(args.rounds - played):"),),
        show=few(IN_SAVE),
    ),
    Truth(
        "says_resuming", LOST_WORK,
        "It reads the checkpoint whole, says so, and drops it. The seed makes the result the same all the same.",
        fails=always(LOST_WORK), cause=NOT_USED, files=("last.pkl",), moments=(step(40, LOST_WORK),),
        cure=(
            ("    load_checkpoint(out", "    weights, step = load_checkpoint(out"),
            ("\n\n\ndef save_checkpoint", "\n    return weights, step\n\n\ndef save_checkpoint"),
        ),
        show=few(IN_SAVE),
    ),
    Truth(
        "saves_at_end", NOT_CHECKED,
        "Its only file is the result. The result is the same after every strike, since all is done again.",
        "model.npy", cause=NO_CHECKPOINT, moments=(step(40, NOT_CHECKED),),
        show=few(KILL),
    ),
    Truth(
        "saves_best", EXACT,
        "What it saves is complete. Saves come after 5, 10, 15, 20 and 55 of 120 steps, so up to 65 are done again.",
        moments=(step(60, EXACT), Moment(IN_SAVE, "temporary.replace(best_path)", 5, EXACT, cut="best.tmp")),
    ),
    Truth(
        "two_files", NOT_EXACT,
        "Each file is whole at every moment, but the two together are not: a kill between the two renames leaves "
        "model.pt of this save and optimizer.pt of the one before, and both are read without a word.",
        "final.pt", fails={IN_SAVE: NOT_EXACT, AT_WRITE: NOT_EXACT, TORN: NOT_EXACT}, cause=MIXED,
        files=("model.pt", "optimizer.pt"),
        moments=(
            Moment(AT_WRITE, "atomic_save(optimizer.state_dict()", 4, NOT_EXACT),
            step(40, EXACT),
            Moment(TORN, "os.replace(temporary, path)", 7, EXACT, cut="model.pt.tmp"),
        ),
        cure=(
            ('{"step": step, **', '{"step": step, "optimizer": optimizer.state_dict(), **'),
            ("    model.load_state", '    optimizer_state = state.pop("optimizer")\n    model.load_state'),
            ("torch.load(OPTIMIZER)", "optimizer_state"),
        ),
        show=few(IN_SAVE),
    ),
    Truth(
        "four_files", STAYS_DOWN,
        "A file cut in the middle of its write fails every restart. Between two files, weights of one save go on "
        "with the generator and the step of the one before.",
        fails={IN_SAVE: STAYS_DOWN, AT_WRITE: STAYS_DOWN, TORN: STAYS_DOWN}, cause=HALF,
        files=("state/weights.npy", "state/momentum.npy", "state/rng.pkl", "state/trainer_state.json"),
        moments=(
            Moment(TORN, 'np.save(save_dir / "momentum.npy"', 4, STAYS_DOWN, cut="state/weights.npy"),
            Moment(TORN, "print(f\"saved a checkpoint", 4, STAYS_DOWN, cut="state/trainer_state.json"),
            Moment(AT_WRITE, 'np.save(save_dir / "momentum.npy"', 4, NOT_EXACT),
            step(40, EXACT),
        ),
        show=few(TORN),
    ),
    Truth(
        "renamed_over", EXACT,
        "The rename is atomic, and the file is synced before it. A torn temporary file is written over.",
        moments=(
            step(40, EXACT),
            Moment(AT_WRITE, "os.replace(TEMPORARY, STATE)", 6, EXACT),
            Moment(TORN, "os.replace(TEMPORARY, STATE)", 6, EXACT, cut="state.bin.tmp"),
        ),
    ),
    Truth(
        "newest_by_number", STAYS_DOWN,
        "The highest number may be a half-written file, on which every restart fails until somebody deletes it.",
        fails={IN_SAVE: STAYS_DOWN, AT_WRITE: STAYS_DOWN, TORN: STAYS_DOWN}, cause=HALF, files=("checkpoint-#.pkl",),
        moments=(
            Moment(TORN, "for old in checkpoints()", 4, STAYS_DOWN, cut="checkpoint-40.pkl"),
            step(40, EXACT),
        ),
        show=few(TORN),
    ),
    Truth(
        "done_marker", EXACT,
        "DONE is written when the other files are closed, and a folder without it is passed over. On a cached mount "
        "DONE can be in the bucket before them.",
        "final.npy", wrong_on=("cached",),
        moments=(
            Moment(AT_WRITE, '(folder / "DONE").touch()', 4, EXACT),
            Moment(TORN, '(folder / "state.json").write_text', 4, EXACT, cut="step_00040/right.npy"),
            step(40, EXACT),
        ),
    ),
    Truth(
        "falls_back", EXACT,
        "If the newest file is missing or torn, the one before it is read: six steps are done again at most. A torn "
        "one is deleted, so that two strikes in a row, both in a save, do not leave two torn ones.",
        moments=(
            step(36, EXACT, TORN, cut="tour.pkl"),
            Moment(AT_WRITE, "newest.write_bytes", 5, EXACT),
            step(36, EXACT),
        ),
    ),
    Truth(
        "handler_mid_epoch", NOT_EXACT,
        "At SIGTERM it saves weights from the middle of an epoch as those of the epoch before, so a restart trains "
        "on the first batches of that epoch twice.",
        fails={SIGTERM: NOT_EXACT}, cause=AT_NOTICE, files=("checkpoint.json",),
        moments=(step(47, NOT_EXACT, SIGTERM, signal="SIGTERM"), step(47, EXACT)),
        cure=(("    save(epoch - 1)\n", ""),),
        show=few(SIGTERM),
    ),
    Truth(
        "handler_workers", STAYS_DOWN,
        "The workers die of the same SIGTERM, so the loader raises before the save, and the program leaves with 1: "
        "SkyPilot calls that a failure of the user's if it sees it before the machine is gone. Started again by "
        "hand, it goes on exactly from the last epoch.",
        "final.pt", fails={SIGTERM: STAYS_DOWN}, cause=WORKERS, files=("last.pt",),
        moments=(Moment(SIGTERM, "loss = (model(inputs)", 28, STAYS_DOWN, "SIGTERM"), step(20, EXACT)),
        cure=(("num_workers=2, persistent_workers=True", "num_workers=0"),),
        show=few(SIGTERM),
    ),
    Truth(
        "not_reproducible", NOT_CHECKED,
        "Two undisturbed runs differ, so the result of a preempted one tells nothing.",
        cause=NOT_REPRODUCIBLE, files=("result.json",),
        show=few(IN_SAVE),
    ),
    Truth(
        "elapsed_in_result", EXACT,
        "Only the key `elapsed` differs, as it does in two undisturbed runs; without the option it is not checked.",
        options=("--ignore-key", "elapsed"), moments=(step(40, EXACT),),
    ),
    Truth(
        "log_first", NOT_EXACT,
        "The stream is read from its front after a restart. The log is there from the start, the first checkpoint "
        "after 25 steps. Where nothing can be appended, a restart fails at its log.",
        fails=always(NOT_EXACT), cause=DATA_ORDER, files=("ckpt/state.json",), refused_on=("s3",),
        moments=(step(50, NOT_EXACT), step(10, NOT_CHECKED)),
        cure=(("in stream():", 'in __import__("itertools").islice(stream(), step, None):'),),
        show=few(IN_SAVE),
    ),
    Truth(
        "endless", NOT_CHECKED, "It trains until it is taken, so there is no result to compare.",
        "estimate.json", cause=ENDLESS, options=("--timeout", "20"),
    ),
    Truth(
        "never_saves", NOT_CHECKED,
        "It writes its result alone. The result is the same after every strike, since all is done again.",
        "centres.csv", cause=NO_CHECKPOINT, moments=(step(40, NOT_CHECKED),),
        show=few(KILL),
    ),
    Truth(
        "rng_ignored", NOT_EXACT,
        "rng_state.pth is written last and in place. If it is missing or torn, the error is swallowed, and the "
        "generator goes on from its seed.",
        fails={IN_SAVE: NOT_EXACT, AT_WRITE: NOT_EXACT, TORN: NOT_EXACT}, cause=RNG_IGNORED,
        files=("checkpoint-#/rng_state.pth",),
        moments=(
            Moment(AT_WRITE, "torch.save(torch.get_rng_state()", 4, NOT_EXACT),
            step(40, NOT_EXACT, TORN, cut="checkpoint-40/rng_state.pth"),
            step(40, EXACT),
        ),
        cure=(
            ('glob("checkpoint-*/model.pt")', 'glob("checkpoint-*/rng_state.pth")'),
            ("torch.load(path)", 'torch.load(path.with_name("model.pt"))'),
        ),
        show=few(TORN),
    ),
    Truth(
        "loads_best", LOST_WORK,
        "best.pkl is that of the third epoch, last.pkl of the newest one, which is not read.",
        fails=always(LOST_WORK), cause=OLDER, files=("weights/best.pkl", "weights/last.pkl"),
        moments=(step(64, LOST_WORK), step(4, EXACT)),
        cure=(("if best_path.exists", "if last_path.exists"), ("best_path.read", "last_path.read")),
        show=few(KILL, SIGTERM),
    ),
    Truth(
        "sorted_by_name", LOST_WORK,
        "The last of the sorted names is ckpt_8, up to step 79.",
        fails=always(LOST_WORK), cause=OLDER, files=("ckpt_#.pkl",),
        moments=(step(64, LOST_WORK), step(8, EXACT)),
        cure=(("_*.pkl\"))", "_*.pkl\"), key=os.path.getmtime)"),),
        show=few(KILL, SIGTERM),
    ),
    Truth(
        "skips_pieces", EXACT,
        "Each shard is whole or not there, and none depends on another.",
        "embeddings/shard_0011.jsonl",
        moments=(
            step(60, EXACT),
            Moment(TORN, "temporary.rename(path)", 6, EXACT, cut="embeddings/shard_0005.tmp"),
        ),
        show=few(KILL, IN_SAVE),
    ),
    Truth(
        "appends_answers", STAYS_DOWN,
        "A line that is cut is no JSON, and every restart fails on it until somebody deletes it.",
        "answers.jsonl", fails={IN_SAVE: STAYS_DOWN, AT_WRITE: STAYS_DOWN, TORN: STAYS_DOWN}, cause=HALF,
        files=("answers.jsonl",), refused_on=("s3",),
        moments=(step(41, STAYS_DOWN, TORN, cut="answers.jsonl"), step(40, EXACT)),
        cure=(
            (
                "    with path.open() as file:",
                "    path.write_text(''.join(line for line in path.open() if line.endswith('\\n')))\n"
                "    with path.open() as file:",
            ),
        ),
        show=few(TORN),
    ),
    Truth(
        "warmup_again", NOT_EXACT,
        "The learning rates of the first 15 steps after a restart are those of the first 15 steps of all.",
        fails=always(NOT_EXACT), cause=LEARNING_RATE, files=("metrics.csv",), refused_on=("s3",),
        moments=(step(40, NOT_EXACT),),
        cure=(("(number + 1) / WARMUP", "step / WARMUP"),),
        show=few(IN_SAVE),
    ),
    Truth(
        "best_score_lost", NOT_EXACT,
        "The best epoch is the second one; after a restart, model_best is that of the next one.",
        "model_best.pth.tar", fails=always(NOT_EXACT), cause=BEST_LOST, files=("model_best.pth.tar",),
        moments=(step(32, NOT_EXACT),),
        cure=(('    print(f"=> loaded', '    best_accuracy = checkpoint["best_accuracy"]\n    print(f"=> loaded'),),
        show=few(IN_SAVE),
    ),
    Truth(
        "epoch_skipped", NOT_EXACT,
        "The epoch after the checkpoint's is never trained on.",
        fails=always(NOT_EXACT), cause=FEWER_STEPS, files=("epoch_#.pkl",),
        moments=(step(40, NOT_EXACT),),
        cure=(('["next_epoch"] + 1', '["next_epoch"]'),),
        show=few(IN_SAVE),
    ),
    Truth(
        "scores_beside", STAYS_DOWN,
        "The newest agent may be half written. Scores that are cut do no harm.",
        fails={IN_SAVE: STAYS_DOWN, AT_WRITE: STAYS_DOWN, TORN: STAYS_DOWN}, cause=HALF, files=("agent_#.dat",),
        moments=(step(30, STAYS_DOWN, TORN, cut="agent_30.dat"), step(40, EXACT)),
        cure=(
            (
                "sorted(out.glob(\"agent_*.dat\"), key=number)",
                "sorted((path for path in out.glob(\"agent_*.dat\") if path.stat().st_size > 1600), key=number)",
            ),
        ),
        show=few(KILL, NOTICE, TORN),
    ),
    Truth(
        "odd_saves", NOT_EXACT,
        "Checkpoints 1, 3, 5, ... lack the momentum; a restart from one of the others is right.",
        fails=always(NOT_EXACT), cause=UNNAMED, moments=(step(36, NOT_EXACT), step(40, EXACT)),
        cure=(("if step // SAVE_EVERY % 2 == 0:", "if True:"),),
        show=few(IN_SAVE, TORN),
    ),
    Truth(
        "two_slots", STAYS_DOWN,
        "A file a.pkl that is cut fails every restart, also where b.pkl is whole. A cut b.tmp is written over.",
        fails={IN_SAVE: STAYS_DOWN, AT_WRITE: STAYS_DOWN, TORN: STAYS_DOWN}, cause=HALF, files=("a.pkl",),
        moments=(step(36, STAYS_DOWN, TORN, cut="a.pkl"), step(36, EXACT), step(40, EXACT)),
        cure=(("if path.exists()]", "if path.exists() and path.read_bytes().endswith(pickle.STOP)]"),),
        show=few(TORN),
    ),
    Truth(
        "slot_without_momentum", NOT_EXACT,
        "a.pkl lacks the momentum; a restart from b.pkl is right. Which of them is the newer one is chance.",
        fails=always(NOT_EXACT), cause=ONE_SLOT, files=("a.pkl",), moments=(step(36, NOT_EXACT), step(40, EXACT)),
        cure=(("if step // SAVE_EVERY % 2 == 0:\n        saved[\"momentum\"], slot = momentum, \"b.pkl\"",
               "saved[\"momentum\"] = momentum\n    if step // SAVE_EVERY % 2 == 0:\n        slot = \"b.pkl\""),),
        show=few(IN_SAVE),
    ),
    Truth(
        "clears_first", LOST_WORK,
        "Before the fifth save is written, the four that are there are deleted; and so again four saves later.",
        fails={IN_SAVE: LOST_WORK, AT_WRITE: LOST_WORK, TORN: LOST_WORK}, cause=DELETED, files=("states/step_#.pkl",),
        moments=(Moment(AT_WRITE, "temporary.write_bytes(", 5, LOST_WORK), step(36, EXACT)),
        cure=(("for path in old:", "for path in sorted(old, key=number)[:-1]:"),),
        show=few(AT_WRITE),
    ),
)  # fmt: skip
