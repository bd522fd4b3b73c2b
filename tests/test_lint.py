"""Lint: every finding is planted once, and a clean file has none."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import REPO, clean_env
from support_sky import run_sky

from skyspot.lint import linter, resources, rules
from skyspot.migrate.source import task_yaml
from skyspot.task import known_keys, ladder, shell
from skyspot.task.options import Options
from skyspot.task.shell import commands

TRAINER = """\
name: mine
num_nodes: 1
resources:
  job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [75]}
  accelerators: A100:8
  use_spot: true
envs:
  SKYSPOT_CHECKPOINT_DIR: /checkpoints/mine
file_mounts:
  /checkpoints: {source: s3://bucket, mode: MOUNT}
  /data: {source: s3://corpus, mode: MOUNT}
  ~/skyspot/trainer: ./trainer
setup: |
  set -e
  bash ~/skyspot/trainer/setup.sh
run: |
  # Not this one: python -m http.server
  cd ~/skyspot
  exec ~/skyspot/python -m trainer --checkpoint-dir "$SKYSPOT_CHECKPOINT_DIR" --data /data
"""
OTHER = """\
workdir: .
num_nodes: 2
resources:
  job_recovery: FAILOVER
  ordered:
    - {accelerators: A100:8, use_spot: true, infra: aws}
    - {accelerators: L4:8, use_spot: true}
    - {accelerators: A100:8, use_spot: false}
envs:
  WANDB_MODE: offline
  TOKENIZER: gpt2
  MAX_TOKENS: 512
file_mounts:
  /checkpoints: {name: bucket, mode: MOUNT}
  /data: s3://corpus
setup: pip install torch && pip install transformers
run: |
  python train.py --save-dir /checkpoints \\
    --data-dir /data
"""

# (name, level, line, file, text taken out of it, text put in)
PLANTED = [
    # -- checkpoints
    ("checkpoint-on-copy", "error", 14, OTHER, "{name: bucket, mode: MOUNT}", "s3://bucket"),
    ("checkpoint-on-copy", "error", 14, OTHER, "{name: bucket, mode: MOUNT}", "{source: s3://bucket, mode: copy}"),
    ("checkpoint-on-copy", "error", 14, OTHER, "{name: bucket, mode: MOUNT}", "./folder"),
    ("checkpoint-on-copy", "error", 10, TRAINER, "{source: s3://bucket, mode: MOUNT}", "s3://bucket/prefix"),
    ("checkpoint-on-cached-mount", "warning", 14, OTHER, "mode: MOUNT}", "mode: MOUNT_CACHED}"),
    ("checkpoint-on-cached-mount", "warning", 15, OTHER, "{name: bucket, mode: MOUNT}", "\n    mode: mount_cached"),
    ("checkpoint-on-read-only-mount", "error", 14, OTHER, "MOUNT}", "MOUNT, config: {mount: {read_only: true}}}"),
    ("checkpoint-on-machine", "error", 18, OTHER, "--save-dir /checkpoints", "--save-dir ~/out"),
    ("checkpoint-on-machine", "error", 18, OTHER, "--save-dir /checkpoints", '--save-dir "$HOME/out"'),
    ("checkpoint-on-machine", "error", 18, OTHER, "--save-dir /checkpoints", "--output_dir=/home/ubuntu/out"),
    ("checkpoint-on-machine", "error", 18, OTHER, "--save-dir /checkpoints", "--output_dir out"),
    ("checkpoint-on-machine", "error", 19, OTHER, "--save-dir /checkpoints", "\\\n  trainer.default_root_dir=/tmp/out"),
    ("checkpoint-on-machine", "warning", 10, OTHER, "WANDB_MODE: offline", "CKPT_DIR: ./ckpt"),
    ("checkpoint-outside-mounts", "warning", 18, OTHER, "--save-dir /checkpoints", "--save-dir /mnt/efs/mine"),
    ("checkpoint-outside-mounts", "error", 18, OTHER, "--save-dir /checkpoints", "--save-dir /checkpoint"),
    ("checkpoint-outside-mounts", "error", 8, TRAINER, "DIR: /checkpoints", "DIR: /ckpt\n  SKYSPOT_MOUNT: /ckpt"),
    ("checkpoint-outside-mounts", "warning", 8, TRAINER, "DIR: /checkpoints", "DIR: /ckpt"),
    ("no-checkpoint-mount", "warning", 6, TRAINER, "  /checkpoints: {source: s3://bucket, mode: MOUNT}\n", ""),
    ("no-checkpoint-mount", "error", 6, OTHER, "  /checkpoints: {name: bucket, mode: MOUNT}\n", ""),
    # -- mounts
    ("prefix-under-mount", "error", 10, TRAINER, "s3://bucket", "s3://bucket/team/x"),
    ("prefix-under-mount", "error", 11, TRAINER, "{source: s3://corpus, mode: MOUNT}", "{source: gs://corpus/x}"),
    ("prefix-under-mount", "error", 10, TRAINER, "s3://bucket", "r2://bucket/team"),
    ("prefix-under-mount", "error", 10, TRAINER, "s3://bucket", "cos://us-east/bucket/team"),
    ("prefix-under-mount", "error", 10, TRAINER, "s3://bucket", "s3://bucket/$SKYSPOT_CHECKPOINT_DIR"),
    ("azure-prefix-dropped", "warning", 10, TRAINER, "s3://bucket", "https://acc1.blob.core.windows.net/box/team"),
    ("mount-refused", "error", 10, TRAINER, "{source:", "{name: other, source:"),
    ("mount-refused", "error", 10, TRAINER, "source: s3://bucket", "name: s3://bucket"),
    ("mount-refused", "error", 10, TRAINER, "source: s3://bucket", "source: ./folder"),
    # -- recovery
    ("no-75", "error", 4, TRAINER, ", recover_on_exit_codes: [75]", ""),
    ("no-75", "error", 4, TRAINER, "[75]", "[3, 4]"),
    ("no-75", "error", 18, TRAINER, "  job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [75]}\n", ""),
    ("recovers-on-75", "warning", 4, OTHER, "FAILOVER", "{strategy: FAILOVER, recover_on_exit_codes: 75}"),
    ("recovers-on-errors", "error", 6, OTHER, "FAILOVER", "\n    recover_on_exit_codes:\n    - 1"),
    ("recovers-on-errors", "error", 4, OTHER, "FAILOVER", "{recover_on_exit_codes: [0]}"),
    ("recovers-on-errors", "error", 4, OTHER, "FAILOVER", "{recover_on_exit_codes: [137]}"),
    ("recovers-on-errors", "warning", 4, TRAINER, "[75]", "[0, 75]"),
    ("recovers-on-errors", "error", 4, TRAINER, "[75]", "[1, 75]"),
    ("recovers-on-a-stop", "error", 4, TRAINER, "[75]", "[75, 79]"),
    ("recovers-on-a-stop", "error", 4, TRAINER, "[75]", "[75, 80]"),
    ("unknown-recovery-key", "error", 4, TRAINER, "{strategy", "{max_restarts: 3, strategy"),
    ("unknown-strategy", "error", 4, OTHER, "FAILOVER", "FAILOVR"),
    ("eager-next-region", "warning", 4, OTHER, "FAILOVER", "eager_next_region"),
    ("differing-recovery", "error", 7, OTHER, "L4:8,", "L4:8, job_recovery: {max_restarts_on_errors: 1},"),
    ("differing-recovery", "error", 7, OTHER, "L4:8,", "L4:8, job_recovery: {strategy: null},"),
    ("differing-priority", "error", 7, OTHER, "L4:8,", "L4:8, priority: 3,"),
    # -- accelerators and places
    ("unknown-gpu", "error", 5, TRAINER, "A100:8", "A1000:8"),
    ("unknown-gpu", "error", 5, TRAINER, "A100:8", "{A1000: 8}"),
    ("unknown-gpu", "error", 5, TRAINER, "A100:8", "A100-80:8"),
    ("unknown-gpu", "error", 6, OTHER, "A100:8, use_spot: true", "H1000:8, use_spot: true"),
    ("unknown-gpu", "error", 7, TRAINER, "A100:8", "\n  - A10g:8\n  - A1000:8"),
    ("gpu-torch-cannot-use", "error", 5, TRAINER, "A100:8", "V100:8"),
    ("gpu-torch-cannot-use", "error", 5, TRAINER, "A100:8", "p100"),
    ("gpu-torch-cannot-use", "error", 5, TRAINER, "accelerators: A100:8", "gpus: {P4: 1}"),
    ("gpu-torch-cannot-use", "error", 7, TRAINER, "A100:8", "\n  - A100:8\n  - M60:1"),
    ("gpu-torch-cannot-use", "error", 5, TRAINER, "A100:8", "tpu-v5p-8"),
    ("gpu-torch-cannot-use", "warning", 5, TRAINER, "A100:8", "V100:8\n  image_id: docker:mine"),
    ("on-demand-first", "warning", 6, OTHER, "A100:8, use_spot: true", "A100:8"),
    ("no-spot-there", "error", 6, TRAINER, "use_spot: true", "use_spot: true\n  infra: slurm/lab/gpu"),
    ("no-spot-there", "error", 6, TRAINER, "use_spot: true", "use_spot: true\n  cloud: Lambda"),
    ("no-spot-there", "warning", 6, OTHER, "infra: aws", "infra: lambda"),
    ("grace-too-long", "warning", 19, TRAINER, "--data /data", "--data /data --grace 60"),
    ("grace-too-long", "warning", 8, TRAINER, "envs:", "envs:\n  SKYSPOT_GRACE_S: 60"),
    ("grace-too-long", "warning", 20, TRAINER.replace("--data /data", "--data /data --grace 6"), "use_spot: true",
     "use_spot: true\n  infra: runpod"),
    # -- commands
    ("secret-in-envs", "warning", 10, OTHER, "WANDB_MODE: offline", "HF_TOKEN: hf_abc"),
    ("secret-in-envs", "warning", 10, OTHER, "WANDB_MODE: offline", "wandb_api_key: abc"),
    ("secret-in-envs", "warning", 10, OTHER, "WANDB_MODE: offline", "DB_PASSWORD: abc"),
    ("secret-in-envs", "warning", 10, OTHER, "WANDB_MODE: offline", "AWS_SECRET_ACCESS_KEY: abc"),
    ("setup-without-set-e", "warning", 16, OTHER, "pip install torch && ", "|\n  pip install torch\n  "),
    ("setup-without-set-e", "warning", 16, OTHER, "torch && ", "torch; "),
    ("exec-skips-uploads", "warning", 19, TRAINER, "s3://corpus, mode: MOUNT", "s3://corpus, mode: MOUNT_CACHED"),
    ("script-not-there", "error", 18, OTHER, "workdir: .", "name: mine"),
    ("script-not-there", "warning", 18, OTHER, "workdir: .\nnum_nodes: 2\nresources:",
     "num_nodes: 2\nresources:\n  image_id: docker:mine"),
    ("torch-unpinned", "error", 16, OTHER, "L4:8", "V100:8"),
    ("torch-unpinned", "warning", 16, OTHER, "L4:8", "P100:8, image_id: docker:mine"),
    # -- the file
    ("not-yaml", "error", 3, OTHER, "num_nodes: 2\nresources:", "num_nodes: 2\n resources: ]"),
    ("unknown-key", "error", 2, OTHER, "num_nodes", "num_node"),
    ("unknown-key", "error", 7, OTHER, "{accelerators: L4", "{acelerators: L4"),
    ("unknown-key", "error", 4, OTHER, "job_recovery", "max_restarts_on_errors: 3\n  job_recovery"),
    ("unknown-key", "error", 14, OTHER, "mode: MOUNT}", "mode: MOUNT, read_only: true}"),
    ("unknown-key", "error", 14, OTHER, "MOUNT}", "MOUNT, config: {mount: {readonly: true}}}"),
    ("unknown-key", "warning", 14, OTHER, "MOUNT}", "MOUNT, config: {read_only: true}}"),
    ("unknown-key", "error", 2, OTHER, "num_nodes: 2", "config: {docker: {run_option: [--ipc=host]}}"),
    ("unknown-key", "warning", 2, OTHER, "num_nodes: 2", "config: {kubernets: {pod_config: {spec: {}}}}"),
    ("service-section", "error", 1, OTHER, "workdir: .", "service: {readiness_probe: /health}"),
    ("service-section", "error", 1, OTHER, "workdir: .", "pool: {workers: 3}"),
    ("unknown-ignore", "warning", 2, OTHER, "num_nodes: 2", "num_nodes: 2  # skyspot: ignore[no-76]"),
    ("not-a-task", "error", 1, OTHER, OTHER, "services: {web: {image: nginx}}\n"),
]  # fmt: skip


def brief(text: str, **options: float) -> list[tuple[str, str, int]]:
    return [(found.name, found.level, found.line) for found in linter.findings(text, **options)]


@pytest.mark.parametrize("text", [TRAINER, OTHER], ids=["the trainer", "another program"])
def test_a_clean_file_has_no_finding(text: str) -> None:
    assert linter.findings(text) == []


@pytest.mark.parametrize(
    ("name", "level", "line", "text", "old", "new"), PLANTED, ids=lambda value: value if "-" in str(value)[:20] else ""
)
def test_what_is_planted_is_found_alone_at_its_line(
    name: str, level: str, line: int, text: str, old: str, new: str
) -> None:
    planted = text.replace(old, new, 1)
    assert planted != text
    assert brief(planted) == [(name, level, line)]


def test_every_rule_is_in_the_list_and_was_planted() -> None:
    assert sorted(rules.CODES) == sorted({planted[0] for planted in PLANTED})
    levels = {code: {p[1] for p in PLANTED if p[0] == code} for code in rules.CODES}
    for rule in rules.RULES:
        assert levels[rule.code] <= {*rule.level.split(" or ")}, rule.code
    named = set()
    for path in (REPO / "skyspot" / "lint").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                named.add(getattr(node.args[2], "value", None))
    assert {name for name in named if name} <= {*rules.CODES}


@pytest.mark.parametrize(("name", "text", "old", "new"), [(p[0], *p[3:]) for p in PLANTED])
def test_a_finding_says_what_and_what_to_do_in_two_lines(name: str, text: str, old: str, new: str) -> None:
    for finding in linter.findings(text.replace(old, new, 1)):
        said = linter.shown(finding, "mine.yaml")
        first, second = said.split("\n")
        assert first.startswith(f"mine.yaml:{finding.line}: {finding.level}: ")
        assert second.strip()
        assert second[-1] in ".?"
        assert max(map(len, (first, second))) < 280


MOUNTED, SAVES = "{name: bucket, mode: MOUNT}", "--save-dir /checkpoints"
NOT_RUN = """\
  # python -m trainer
  echo python -m trainer
  cat > x <<'E'
  python -m trainer
  E
  python"""


def other(*changes: tuple[str, str]) -> str:
    """OTHER with these texts changed."""
    text = OTHER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


FINE = [
    # A cached mount that is only read, and an `exec` that replaces nothing.
    TRAINER.replace("corpus, mode: MOUNT", "corpus, mode: MOUNT_CACHED, config: {mount_cached: {read_only: true}}"),
    other(("/data: s3://corpus", "/data: {name: c, mode: MOUNT_CACHED}"), ("  python", "  exec > log 2>&1\n  python")),
    # The trainer is not what a comment, an `echo` or a here-document says.
    other(("  python", NOT_RUN)),
    # A shared folder, which our trainer looks at for itself.
    TRAINER.replace("/checkpoints/mine", "/mnt/efs/mine"),
    # A Kubernetes cluster's own names; its volumes last. Slurm's machines are nobody's to rent.
    other(("A100:8, use_spot: true, infra: aws", "MY-GPU:8, use_spot: true, infra: k8s/ctx")),
    other((MOUNTED, "s3://base"), (SAVES, "--save-dir /v/x")) + "volumes: {/v: mine}\n",
    other(("use_spot: true, infra: aws", "infra: slurm/lab")),
    # Told by the shell, a working folder that lasts, a bucket without a mount, what is only read, what nobody knows.
    other((SAVES, "--save-dir out"), ("  python", "  cd /checkpoints && python")),
    other((SAVES, "--save-dir $OUT"), ("  python", "  export OUT=/checkpoints/x\n  python")),
    other((SAVES, "--save-dir s3://bucket/x"), (MOUNTED, "s3://bucket")),
    other(("--data-dir", "--resume-from-checkpoint-dir ~/old --pretrained_ckpt_path=/tmp/x --data-dir")),
    other((SAVES, '--save-dir "$(mktemp -d)"')),
    # Sizes in memory, names in another case, a part of one name alone.
    *(other(("L4:8", name)) for name in ('"80GB+:2"', '"nvidia:24GB:2"', "l4:8", "RTXA6000:8", "V100-32:8")),
    # Nothing, and references, where a secret would stand; what only sounds like one.
    *(
        other(("WANDB_MODE: offline", value))
        for value in ('HF_TOKEN: ""', "HF_TOKEN: $TOKEN", "NUM_KEYS: 3", "KEYS: a")
    ),
    other(("setup: pip install torch &&", "setup: |\n  set -euo pipefail\n  pip install torch\n ")),
    other(("FAILOVER", "none")),
    "",
    "# nothing\n",
    "- a\n- list\n",
    "just words",
    "42",
]


@pytest.mark.parametrize("text", FINE, ids=range(len(FINE)))
def test_what_is_right_is_left_alone(text: str) -> None:
    assert brief(text) == []


def test_a_folder_that_a_command_mounts_or_copies_is_its_business() -> None:
    assert brief(other((SAVES, "--save-dir /mnt/b/x"), ("  python", "  gcsfuse b /mnt/b\n  python"))) == []
    copied = other((SAVES, "--save-dir ./out")) + "  aws s3 sync ./out s3://b/out\n"
    assert brief(copied) == [("checkpoint-on-machine", "warning", 18)]


def test_a_folder_beside_one_that_lasts_only_warns() -> None:
    both = other((SAVES, f"{SAVES} --output_dir /tmp/logs"))
    assert brief(both) == [("checkpoint-on-machine", "warning", 18)]


def test_on_demand_machines_are_not_taken_so_that_it_only_warns() -> None:
    on_demand = ("use_spot: true", "use_spot: false")
    assert brief(other(on_demand, (SAVES, "--save-dir out"))) == [("checkpoint-on-machine", "warning", 18)]
    assert brief(other(on_demand, (MOUNTED, "s3://bucket"))) == [("checkpoint-on-copy", "warning", 14)]


def test_spot_without_a_mount_only_warns_where_nothing_shows_a_training() -> None:
    bare = "resources: {use_spot: true, job_recovery: FAILOVER}\nworkdir: .\nrun: "
    assert brief(f"{bare}nvidia-smi\n") == [("no-checkpoint-mount", "warning", 1)]
    assert brief(f"{bare}python train.py --push_to_hub\n") == [("no-checkpoint-mount", "warning", 1)]
    assert brief(f"{bare}accelerate launch train.py\n") == [("no-checkpoint-mount", "error", 1)]
    assert brief(f"{bare}python x.py\nfile_mounts: {{/data: {{name: b}}}}\n") == [("no-checkpoint-mount", "warning", 1)]


def test_a_mount_called_checkpoints_is_where_they_go_if_nothing_else_is_said() -> None:
    silent = (SAVES, "--epochs 3")
    assert brief(other(silent)) == []
    assert brief(other(silent, (MOUNTED, "s3://bucket"))) == [("checkpoint-on-copy", "error", 14)]


def test_the_longest_grace_is_the_shortest_notice() -> None:
    assert brief(TRAINER, grace_s=30) == []
    assert brief(TRAINER, grace_s=31) == [("grace-too-long", "warning", 6)]
    aws = TRAINER.replace("use_spot: true", "use_spot: true\n  infra: aws/us-east-1")
    assert brief(aws, grace_s=120) == []
    assert brief(aws, grace_s=121) == [("grace-too-long", "warning", 7)]
    assert brief(TRAINER.replace("use_spot: true", "use_spot: false"), grace_s=600) == []
    assert brief(TRAINER.replace("use_spot: true", "use_spot: true\n  infra: runpod")) == [], "the default is shorter"


def test_aliases_and_merge_keys_are_followed_to_where_they_are_written() -> None:
    text = """\
x: &spot {use_spot: true, accelerators: A1000:8}
resources:
  job_recovery: FAILOVER
  ordered:
    - <<: *spot
      infra: aws
    - {<<: [{accelerators: L4:1}, *spot], use_spot: false}
"""
    assert brief(text) == [("unknown-gpu", "error", 1), ("unknown-key", "error", 1)]
    assert brief("resources: &r\n  <<: *r\n  use_spot: true\n  infra: slurm\n") == [("no-spot-there", "error", 3)]
    bomb = "a0: &a0 {k: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}, *a{n}]}}\n" for n in range(40))
    bombs = brief(bomb + "resources: *a40\n")
    assert [found for found in bombs if found[0] != "unknown-key"] == []
    assert len(bombs) == 42  # Each of the 41 mappings, and what they all merge into resources.


def test_each_of_several_documents_is_looked_at() -> None:
    text = "name: chain\n---\n" + TRAINER.replace("A100:8", "A1000:8") + "---\n" + TRAINER.replace("[75]", "[]")
    assert brief(text) == [("unknown-gpu", "error", 7), ("no-75", "error", 26)]


def test_old_spellings_are_understood() -> None:
    text = "resources: {gpus: V100:1, cloud: gcp, use_spot: 'true', spot_recovery: failover}\nrun: python -m trainer\n"
    assert [name for name, _, _ in brief(text)] == ["gpu-torch-cannot-use", "no-75"]


@pytest.mark.parametrize("template", ["finetune", "command"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gpus": "A100*:8,L4:8", "prefer": ("aws/us-east-1",), "on_demand_last": True, "num_nodes": 2},
        {"bucket": "s3://my-bucket/team/x", "data": "gs://corpus/books"},
        {"bucket": "https://account1.blob.core.windows.net/box/team"},
        {"gpus": "A100:8", "infra": "slurm/lab/gpu"},
        {"gpus": "A100:8", "infra": "lambda"},
        {"gpus": "A100:8", "infra": "k8s", "use_spot": False},
        {"secret": {"HF_TOKEN": "hf_abc"}, "env": {"A": "1"}},
    ],
)
def test_a_rendered_template_has_no_finding(template: str, more: dict) -> None:
    assert brief(rendered(template, **more)) == []


@pytest.mark.parametrize("processes", ["8", "auto"])
def test_a_script_under_the_launcher_has_no_finding(processes: str) -> None:
    parameters = {"command": "train.py", "workdir": ".", "processes": processes}
    options = Options(task="command", name="run-001", gpus="A100:8", bucket="s3://my-bucket", parameters=parameters)
    assert brief(task_yaml(options).text) == []


def rendered(template: str, **more: object) -> str:
    parameters = {"command": 'python train.py --out "$SKYSPOT_CHECKPOINT_DIR"', "workdir": "."}
    parameters = parameters if template == "command" else {}
    return task_yaml(Options(task=template, name="run-001", parameters=parameters, **more)).text


def test_the_warnings_that_a_rendered_template_may_have_are_what_was_asked_for() -> None:
    assert [found[:2] for found in brief(rendered("finetune", strategy="eager_next_region"))] == [
        ("eager-next-region", "warning")
    ]
    assert [found[:2] for found in brief(rendered("finetune", env={"HF_TOKEN": "x"}))] == [
        ("secret-in-envs", "warning")
    ]
    # `mkdir -p` makes the folder on the machine's own disk where the file system is not there; the trainer refuses.
    assert brief(rendered("finetune", bucket="/mnt/efs")) == []
    outside = [("checkpoint-outside-mounts", "warning")]
    assert [found[:2] for found in brief(rendered("command", bucket="/mnt/efs"))] == outside
    assert [found[0] for found in brief(rendered("finetune", gpus="A100:8,V100:8"))] == ["gpu-torch-cannot-use"]


# -- keys ------------------------------------------------------------------------------------------------------------

SCHEMA = """
import json
from sky.utils import schemas

def walk(schema, place, found):
    for other in [*schema.get("anyOf", []), *schema.get("oneOf", [])]:
        walk(other, place, found)
    if "properties" in schema:
        found[".".join(place)] = [sorted(schema["properties"]), schema.get("additionalProperties", True) is not False]
        for key, below in schema["properties"].items():
            walk(below, (*place, key), found)
    for below in (schema.get("additionalProperties"), schema.get("items")):
        if isinstance(below, dict):
            walk(below, (*place, "*"), found)

found = {}
walk(schemas.get_task_schema(), (), found)
walk(schemas.get_resources_schema(), ("resources",), found)
walk(schemas.get_storage_schema(), ("file_mounts", "*"), found)
walk(schemas.get_service_schema(), ("service",), found)
volume = sorted(schemas.get_volume_schema()["properties"])
settings = sorted(schemas.get_config_schema()["properties"])
from sky.utils import dag_utils
header = sorted(dag_utils._JOB_GROUP_HEADER_FIELDS)
print(json.dumps({"found": found, "volume": volume, "settings": settings, "header": header}))
"""
# Where SkyPilot takes anything, and what is there is not looked at.
ANYTHING = {"config.kubernetes.quota", "config.slurm.quota", "volume_mounts.*.volume_config"}


def test_the_keys_that_lint_knows_are_those_of_the_installed_skypilot(tmp_path: Path) -> None:
    found = json.loads(run_sky(SCHEMA, tmp_path, None).splitlines()[-1])
    known = {}
    for place, (keys, takes_more) in found["found"].items():
        if "._" in place or place in ANYTHING or place.endswith("volumes.*"):
            continue
        public = [key for key in keys if not key.startswith("_")]
        if place.endswith("job_recovery"):
            assert public == sorted(known_keys.JOB_RECOVERY)
            continue
        known[place] = public
        assert takes_more == (place in known_keys.OPEN), place
    assert {place: sorted(keys) for place, keys in known_keys.KNOWN.items()} == known
    assert found["volume"] == sorted(known_keys.VOLUME)
    assert found["settings"] == sorted(known_keys.SETTINGS)
    assert found["header"] == sorted(known_keys.HEADER)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("acelerators: x\n", "key 'acelerators'. [unknown-key]\n  Did you mean 'accelerators', in resources?"),
        ("resources: {acelerators: x}\n", "'acelerators' in resources. [unknown-key]\n  Did you mean 'accelerators'?"),
        ("resources: {any_of: [{use_spots: 1}]}\n", "in resources.any_of. [unknown-key]\n  Did you mean 'use_spot'?"),
        ("use_spot: true\n", "It belongs in resources; check the indentation."),
        ("job_recovery: FAILOVER\n", "It belongs in resources; check"),
        ("recover_on_exit_codes: [3]\n", "It belongs in resources.job_recovery; check"),
        ("resources: {max_restarts_on_errors: 3}\n", "It belongs in resources.job_recovery; check"),
        ("resources: {run: x}\n", "It belongs at the top level; check the indentation."),
        ("env: {A: b}\n", "Did you mean 'envs'?"),
        ("command: x\n", "Did you mean 'run'?"),
        ("resources: {gpu: A100}\n", "Did you mean 'accelerators'?"),
        ("storage: [{name: b}]\n", "Use file_mounts instead"),
        ("storage_mounts: [{storage: b, mount_path: /b}]\n", "Use file_mounts instead"),
        ("service: {spot_recovery: FAILOVER, readiness_probe: /}\n", "SkyServe replaces every lost replica"),
        ("service: {replica_policy: {num_extra: 1}}\n", "Use num_overprovision."),
        ("file_mounts: {/c: {sorce: s3://b}}\n", "'sorce' in file_mounts. [unknown-key]\n  Did you mean 'source'?"),
        ("config: {hooks: [{runs: x}]}\n", "'runs' in config.hooks. [unknown-key]\n  Did you mean 'run'?"),
        ("workdir: {url: x, branch: main}\n", "'branch' in workdir. [unknown-key]\n  Known keys: ref, url."),
    ],
)  # fmt: skip
def test_an_unknown_key_is_named_with_what_was_meant(text: str, said: str) -> None:
    shown = [linter.shown(found, "mine.yaml") for found in linter.findings(text + "run: echo\n") if "key" in found.name]
    assert len(shown) == 1
    assert said in shown[0]


OTHERS = [
    ("services: {web: {image: nginx}}\nvolumes: {x: }\n", "a docker-compose file"),
    ("version: '3'\nservices:\n  web: {build: .}\n", "a docker-compose file"),
    (
        "jobs: {controller: {resources: {cpus: 4+}}}\nserve: {controller: {resources: {cpus: 4}}}\n",
        "SkyPilot settings",
    ),
    ("kubernetes: {pod_config: {spec: {}}}\nallowed_clouds: [aws]\n", "SkyPilot settings"),
    ("name: v\ntype: k8s-pvc\ninfra: k8s\nsize: 10Gi\n", "a volume"),
    ("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n", "a Kubernetes manifest"),
    ("apiVersion: v1\nkind: Pod\n---\napiVersion: v1\nkind: Service\n", "a Kubernetes manifest"),
    ("on: push\njobs: {build: {runs-on: ubuntu-latest, steps: [{run: make}]}}\n", "a GitHub workflow"),
    ("name: env\nchannels: [conda-forge]\ndependencies: [python]\n", "a conda environment"),
]


@pytest.mark.parametrize(("text", "what"), OTHERS, ids=[what for _, what in OTHERS])
def test_a_file_that_is_no_task_is_told_for_what_it_is(text: str, what: str) -> None:
    (found,) = linter.findings(text)
    assert (found.name, found.level) == ("not-a-task", "error")
    assert what in found.reason


@pytest.mark.parametrize("text", ["name: only\n", "run: x\nservices: {a: b}\n", "config: {docker: {}}\n", "setup: x\n"])
def test_what_may_be_a_task_is_taken_for_one(text: str) -> None:
    assert "not-a-task" not in [found.name for found in linter.findings(text)]


def test_a_header_of_several_tasks_has_keys_of_its_own() -> None:
    assert brief("name: chain\nexecution: serial\n---\nrun: echo\n---\nrun: echo\n") == []
    assert brief("run: echo\nexecution: serial\n---\nrun: echo\n") == [("unknown-key", "error", 2)]
    for key, remedy in (("execution", "It belongs in a first"), ("executions", "Did you mean 'execution', in a first")):
        (found,) = linter.findings(f"name: a\n{key}: parallel\nrun: echo\n")
        assert found.remedy.startswith(f"{remedy} document of its own, above the tasks")


# -- programs --------------------------------------------------------------------------------------------------------

MISSING = [
    "python train.py", "python3 -u src/train.py --lr 1", "python ./train.py", "bash train.sh", "./run.sh",
    "source env.sh",
    "torchrun --nproc_per_node=$N train.py", "accelerate launch --mixed_precision bf16 train.py", "uv run train.py",
    "uv run --with torch python train.py", "python -m torch.distributed.run --nproc_per_node 8 train.py",
    "cd src && python train.py", "nohup python train.py", "CUDA_VISIBLE_DEVICES=0 python train.py",
    "echo train.py\npython train.py", "chmod +x ./run.sh && ./run.sh", "bash -c 'python train.py'",
    "python -m src.train --lr 1", "cd src; python3 -um train",
    "deepspeed --num_gpus 8 train.py", "python ~/sky_workdir/train.py", "python $HOME/sky_workdir/train.py",
    "timeout 3h python train.py", "timeout -s INT --kill-after 30 3h ./run.sh", "timeout --signal=INT 3h bash train.sh",
    "stdbuf -oL python train.py", "numactl -N 0 --membind 0 python train.py",
    "numactl --cpunodebind=0 torchrun train.py",
    "screen -dmS name python train.py", "screen -S name -dm bash -c 'python train.py'", "nice -n 10 python train.py",
    "nice -10 python train.py", "env A=b python train.py", "env -u HOME A=b python train.py",
    "poetry run python train.py",
    "conda run -n x --no-capture-output python train.py", "uv run --no-sync python -u train.py", "srun python train.py",
    "srun -n 8 --gpus 8 python train.py", "sudo -E -u root python train.py",
    "nohup nice -n 5 timeout 3h python train.py",
    "taskset -c 0-7 python -m src.train", "taskset -c 0 bash -c 'python train.py'", "setsid -f ./run.sh",
    "ionice -c 3 python train.py", "pipenv run python train.py", "time -p python train.py",
]  # fmt: skip
MISSING_SETUP = [
    ("bash install.sh", "install.sh"), ("./install.sh", "./install.sh"), ("timeout 600 bash install.sh", "install.sh"),
    ("pip install -r requirements.txt", "requirements.txt"), ("pip install -U -r reqs/dev.txt wheel", "reqs/dev.txt"),
    ("python -m pip install --requirement=requirements.txt", "requirements.txt"), ("pip3 install -e .", "."),
    ("uv pip install -r requirements.txt", "requirements.txt"), ("pip install .", "."),
    ("pip install '.[dev]'", ".[dev]"),
    ("conda env create -n x -f environment.yml", "environment.yml"), ("pip install -e ./lib[x]", "./lib[x]"),
    ("conda run -n x pip install -r requirements.txt", "requirements.txt"), ("python prepare.py", "prepare.py"),
    ("echo y > a.txt && pip install -r b.txt", "b.txt"),
]  # fmt: skip
THERE_SETUP = [
    "git clone https://x/y\ncd y && pip install -r requirements.txt && pip install -e .",
    "wget https://x/install.sh\nbash install.sh", "curl https://x/i.sh | bash", "curl https://x/i.sh | bash -s -- -y",
    "wget -q https://x/Miniconda3.sh -O ~/conda.sh && bash ~/conda.sh -b", "source ~/.bashrc", ". .venv/bin/activate",
    "wget https://x/Miniconda3-latest.sh\nbash Miniconda3-latest.sh -b", "source ~/conda/etc/profile.d/conda.sh",
    "pip install -r /code/requirements.txt", "cd /code && pip install -e .", "pip install -r https://x/requirements.txt",
    "echo torch > requirements.txt\npip install -r requirements.txt", "cat <<E | tee r.txt\nE\npip install -r r.txt",
    "pip install torch", "pip install -r <(echo torch)", "pip install -r $REQUIREMENTS", "python -m virtualenv venv",
    "python -m venv venv", "sudo apt-get update && sudo apt-get install -y x", "timeout 600 git clone https://x/y .",
    "timeout 60 rsync -a host:code/ .\npip install -r requirements.txt", "pip uninstall -y -r requirements.txt",
    "pip install git+https://x/y", "conda create -n x python=3.11", "docker run -v .:/x image bash install.sh",
    "nice -n 10 aws s3 sync s3://b .\nbash install.sh", "timeout 3h mytool train.py",
]  # fmt: skip
THERE = [
    "git clone https://x/y\ncd y\npython train.py", "curl -O https://x/train.py\npython train.py",
    "cat > train.py <<E\nE\npython train.py", "echo 'print(1)' > train.py\npython train.py", "python /app/train.py",
    "python ~/code/train.py", "cd /app && python train.py", "python -c 'import train'", "python -m http.server",
    "pip install vllm && python -m vllm.server", "python -m torch.utils.collect_env", "cd $DIR && python train.py",
    "hf_download t.py; python train.py",
    "python $SCRIPT", 'python "$DIR/train.py"', "python - train.py", "nvidia-smi", "pip install x.sh", "train.py",
    "ls train.py", "python /code/train.py", "cd /code; python train.py", "python tool $X/train.py",
    "aws s3 cp s3://b/t.py . && python t.py",
]  # fmt: skip


def running(run: str, more: str = "") -> str:
    return f"{more}run: |\n" + "".join(f"  {line}\n" for line in run.split("\n"))


@pytest.mark.parametrize("run", MISSING)
def test_a_script_that_nothing_brings_is_found(run: str) -> None:
    assert [found[:2] for found in brief(running(run))] == [("script-not-there", "error")]
    assert brief(running(run, "workdir: ./project\n")) == []
    assert brief(running(run, "workdir: {url: https://x/y}\n")) == []
    assert brief(running(run, "file_mounts: {~/sky_workdir: ./project}\n")) == []
    assert brief(running(run, "setup: git clone https://x/y .\n")) == []


@pytest.mark.parametrize(("setup", "missing"), MISSING_SETUP)
def test_a_file_that_setup_needs_and_nothing_brings_is_found(setup: str, missing: str) -> None:
    text = running(setup).replace("run:", "setup:") + "run: nvidia-smi\n"
    [found] = linter.findings(text)
    assert (found.name, found.level, found.line) == ("script-not-there", "error", 2)
    assert found.reason.startswith("`setup` ")
    assert f"'{missing}'" in found.reason
    for more in ("workdir: ./project\n", "workdir: {url: https://x/y}\n", "file_mounts: {~/sky_workdir: ./project}\n"):
        assert brief(more + text) == []


@pytest.mark.parametrize("setup", THERE_SETUP)
def test_a_file_that_setup_may_find_is_left_alone(setup: str) -> None:
    text = running(setup).replace("run:", "setup:") + "file_mounts: {/code: ./code}\n"
    assert [found for found in brief(text) if found[0] != "setup-without-set-e"] == []


def test_what_setup_brings_is_there_for_run_which_starts_at_the_top_again() -> None:
    setup = "setup: |\n  set -e\n  git clone https://x/y\n  cd y\n"
    assert brief(f"{setup}run: python y/train.py\n") == []
    [found] = brief("setup: cd /code\nfile_mounts: {/code: ./code}\nrun: python train.py\n")
    assert found == ("script-not-there", "error", 3)
    assert [found[2] for found in brief("setup: bash a.sh\nrun: bash a.sh\n")] == [1]


@pytest.mark.parametrize("run", THERE)
def test_a_script_that_may_be_there_is_left_alone(run: str) -> None:
    assert brief(running(run, "file_mounts: {/code: ./code}\n")) == []


def test_what_our_launcher_starts_and_where_a_module_lies_are_known() -> None:
    assert ("script-not-there", "error", 2) in brief(running("python -m trainer.launch --processes 8 train.py"))
    assert brief(running("python -m train", "file_mounts: {~/sky_workdir/train.py: ./train.py}\n")) == []
    assert brief(running("python -m train", "envs: {PYTHONPATH: /code}\n")) == []
    assert brief(running("python -m train", "resources: {image_id: docker:mine}\n")) == []


UNPINNED = [
    "pip install torch", "pip3 install -U torch torchvision", "python -m pip install torch", "uv pip install torch",
    "uv pip install 'torch>=2.2'", "pip install torch[opt] transformers", "uv add torch", "conda install pytorch",
    "conda install -y -c conda-forge pytorch", "uv run --with torch python -c 1", "pip install 'torch!=2.5'",
    "pip install torch --index-url https://download.pytorch.org/whl/cu130", "poetry add torch", "pipenv install torch",
    "pdm add torch", "pip3.11 install torch", "timeout 600 pip install torch", "conda run -n x pip install torch",
    "pip install torchvision", "uv pip install torchaudio", "conda install torchvision", "poetry add torchvision",
    "pip install torchvision>0.10", "mamba install pytorch",
]  # fmt: skip
PINNED = [
    "pip install torch==2.4.1", "pip install 'torch<2.8'", "pip install 'torch>=2,<2.8'", "pip install torch~=2.4",
    "pip install torch --index-url https://download.pytorch.org/whl/cu126", "pip list torch", "poetry add torch@2.4.1",
    "pip install torchvision torch==2.4.1", "pip install torchvision==0.19.1", "poetry add 'torch<2.8' torchvision",
    "pip install torch==2.4.1 && pip install torchaudio", "pip install torchmetrics", "conda run -n torch pip list",
    "pip install torchvision --index-url https://download.pytorch.org/whl/cu126",
    "pip install torch --extra-index-url=https://download.pytorch.org/whl/cu118", "conda install pytorch=2.4",
    "conda install pytorch -c pytorch -c nvidia", "conda install pytorch pytorch-cuda=12.1", "conda create -n torch",
    "pip uninstall torch", "echo pip install torch", "pip install -r requirements.txt", "python install.py torch",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["V100", "P100", "P4", "M60"])
def test_the_newest_torch_on_an_old_accelerator_is_found(kind: str) -> None:
    for setup in UNPINNED:
        text = f"workdir: .\nresources: {{accelerators: {kind}:8}}\nsetup: |\n  {setup}\nrun: nvidia-smi\n"
        assert brief(text) == [("torch-unpinned", "error", 4)], setup
        assert brief(text.replace("setup:", "run:").replace("run: nvidia-smi\n", "")) == brief(text), "in `run`, too"
        assert brief(text.replace(kind, "A100")) == []
    for setup in PINNED:
        assert brief(f"workdir: .\nresources: {{accelerators: {kind}:8}}\nsetup: {setup}\nrun: nvidia-smi\n") == [], (
            setup
        )


OLD_INSTANCES = [
    ("p2.xlarge", "K80"), ("p3.2xlarge", "V100"), ("p3dn.24xlarge", "V100-32GB"), ("g3.4xlarge", "M60"),
    ("g3s.xlarge", "M60"), ("Standard_NC6", "K80"), ("Standard_NC24r", "K80"), ("Standard_NC6s_v2", "P100"),
    ("Standard_NC24rs_v3", "V100"), ("Standard_ND24s", "P40"), ("Standard_ND40rs_v2", "V100-32GB"),
    ("Standard_NV12", "M60"), ("Standard_NV48s_v3", "M60"), ("gpu_8x_v100", "V100"), ("gpu_8x_v100_n", "V100"),
]  # fmt: skip
NEW_INSTANCES = [
    "p4d.24xlarge", "p5.48xlarge", "g4dn.xlarge", "g5.xlarge", "g6.xlarge", "Standard_NC24ads_A100_v4", "m5.large",
    "Standard_NC4as_T4_v3", "Standard_ND96asr_v4", "Standard_NV36ads_A10_v5", "gpu_8x_a100", "a2-highgpu-8g", "p30.big",
    "Standard_NC40ads_H100_v5", "Standard_NV4as_v4", "c3.large",
]  # fmt: skip


def test_an_instance_type_counts_as_its_accelerator() -> None:
    def of(instance: str) -> str:
        return f"workdir: .\nresources:\n  instance_type: {instance}\nsetup: pip install torch\nrun: nvidia-smi\n"

    for instance, accelerator in OLD_INSTANCES:
        assert brief(of(instance)) == [("torch-unpinned", "error", 4)], instance
        [found] = linter.findings(of(instance))
        assert f"'{accelerator}'" in found.reason
        recovery = "job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [75]}"
        ours = f"resources:\n  {recovery}\n  instance_type: {instance}\n"
        ours += "run: python -m trainer --checkpoint-dir /checkpoints\n"
        mounted = f"{ours}file_mounts: {{/checkpoints: {{source: s3://bucket}}}}\n"
        assert brief(mounted) == [("gpu-torch-cannot-use", "error", 3)], instance
    for instance in NEW_INSTANCES:
        assert brief(of(instance)) == [], instance


# -- overruled -------------------------------------------------------------------------------------------------------


def levels(text: str, **options: object) -> list[tuple[str, str]]:
    return [(found.name, found.level) for found in linter.findings(text, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "resources: {accelerators: A1000:8, infra: aws}  # skyspot: ignore[unknown-gpu]\n",
        "resources: {accelerators: A1000:8, infra: aws}  # mine # skyspot:ignore[no-75, unknown-gpu]\n",
        "# skyspot: ignore[unknown-gpu]\nresources: {accelerators: A1000:8, infra: aws}\n",
        "# skyspot: ignore[unknown-gpu]\n# ours\nresources: {accelerators: A1000:8, infra: aws}\n",
        "resources:\n  infra: aws\n  # skyspot: ignore[unknown-gpu]\n  accelerators: A1000:8\n",
    ],
)
def test_a_comment_turns_a_finding_into_a_note(text: str) -> None:
    assert levels(text) == [("unknown-gpu", "note")]
    (note,) = linter.findings(text)
    assert linter.shown(note, "x").endswith("(ignored). [unknown-gpu]")
    assert len(linter.shown(note, "x").splitlines()) == 1


def test_a_comment_counts_for_its_own_line_alone() -> None:
    text = "# skyspot: ignore[unknown-gpu]\nname: x\nresources: {accelerators: A1000:8, infra: aws}\n"
    assert levels(text) == [("unknown-gpu", "error")]
    other = "resources: {accelerators: A1000:8, infra: aws}  # skyspot: ignore[no-75]\n"
    assert levels(other) == [("unknown-gpu", "error")]


def test_a_comment_above_a_command_counts_for_all_of_its_lines() -> None:
    text = "run: |\n  # skyspot: ignore[script-not-there]\n  python -u \\\n    train.py\n"
    assert levels(text) == [("script-not-there", "note")]


def test_ignore_turns_every_finding_of_a_rule_into_a_note() -> None:
    text = "resources: {accelerators: A1000:8, infra: aws, use_spots: true}\n"
    assert levels(text, ignored=["unknown-gpu"]) == [("unknown-key", "error"), ("unknown-gpu", "note")]


@pytest.mark.parametrize(
    ("comment", "remedy"),
    [
        ("ignore[unknown-gpus]", "Did you mean 'unknown-gpu'?"), ("ignore[quark]", "See `skyspot lint --list`"),
        ("ignore", "Add the code of the finding: ignore[CODE]"),
        ("ignore[]", "Add the code of the finding: ignore[CODE]"),
    ],
)  # fmt: skip
def test_a_comment_that_names_no_rule_is_a_warning(comment: str, remedy: str) -> None:
    (found,) = linter.findings(f"name: x  # skyspot: {comment}\n")
    assert (found.name, found.level, found.line) == ("unknown-ignore", "warning", 1)
    assert remedy in found.remedy


# -- the shell -------------------------------------------------------------------------------------------------------

RUNS = [
    ("python -m trainer --data x", True),
    ("python3 -u -X dev -m trainer.launch train.py", True),
    ("exec ~/skyspot/python -m trainer", True),
    ("cd x && A=1 /opt/venv/bin/python3.11 -um trainer", True),
    ("uv run --python 3.11 python -m trainer", True),
    ("bash -lc 'python -m trainer'", True),
    ("python \\\n  -m trainer", True),
    ('"$PYTHON" -m trainer', True),
    ("RUN='python -m trainer'\neval \"$RUN\"", True),
    ("if true; then python -m trainer; fi", True),
    ("# python -m trainer", False),
    ("x # python -m trainer", False),
    ("python train.py -m trainer", False),
    ("python -m trainer.check", False),
    ("python -m trainers", False),
    ("python -m mytrainer", False),
    ("accelerate launch python -m trainer", False),
    ("torchrun -m trainer", False),
    ("echo 'python -m trainer'", False),
    ("echo python -m trainer", False),
    ("cat <<EOF > f\npython -m trainer\nEOF", False),
    ("", False),
]


def starts_our_trainer(run: str, envs: dict[str, str] | None = None) -> bool:
    return any(shell.starts_our_trainer(command) for command in commands(run, envs))


@pytest.mark.parametrize(("run", "ours"), RUNS)
def test_our_trainer_is_known_by_the_command_that_starts_it(run: str, ours: bool) -> None:
    assert starts_our_trainer(run) is ours


def test_our_trainer_is_known_through_a_variable_of_the_task() -> None:
    assert not starts_our_trainer('bash -c "$CMD"')
    assert starts_our_trainer('bash -c "$CMD"', {"CMD": "python -m trainer"})


WORDS = [
    ("a 'b c' \"d $X e\" f\\ g", [["a", "b c", "d 1 e", "f g"]]),
    ("a;b&&c||d|e&f", [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]),
    ("a >x 2>&1 &>y", [["a", ">x", "2>&1", "&>y"]]),
    ("a $(b c; d) `e f` ${Y:-z} $Y '$X'", [["a", "$(b c; d)", "`e f`", "z", "$Y", "$X"]]),
    ("X=2\na $X", [["X=2"], ["a", "2"]]),
    ("a (b", [["a"], ["b"]]),
    ("a 'b", [["a", "b"]]),
    ('a "b', [["a", "b"]]),
    ("a#b #c\nd", [["a#b"], ["d"]]),
    ("a <<E x\nb\nE\nc", [["a", "<<E", "x"], ["c"]]),
    ("a <<<E\nb", [["a", "<<<E"], ["b"]]),
    ("a ''", [["a", ""]]),
]


@pytest.mark.parametrize(("script", "words"), WORDS)
def test_a_script_is_read_as_a_shell_reads_it(script: str, words: list[list[str]]) -> None:
    assert [[word.text for word in command.words] for command in commands(script, {"X": "1"})] == words


# -- anything at all -------------------------------------------------------------------------------------------------

KEYS = [
    "name", "num_nodes", "resources", "job_recovery", "strategy", "recover_on_exit_codes", "ordered", "any_of", "gpus",
    "accelerators", "use_spot", "infra", "cloud", "priority", "envs", "SKYSPOT_CHECKPOINT_DIR", "SKYSPOT_GRACE",
    "A_TOKEN", "file_mounts", "/checkpoints", "~/x", "source", "mode", "config", "mount", "read_only", "volumes",
    "setup", "run", "<<", "", "image_id", "spot_recovery",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.datetimes(), st.binary(max_size=8), st.text(),
    st.sampled_from([
        "A100:8", "A1000", "tpu-v\n", "s3://b/p", "s3://", "https://acc1.blob.core.windows.net/b/p", "MOUNT", "COPY",
        "MOUNT_CACHED", "aws/us-east-1", "slurm", "*", "/checkpoints", "~", ".", "..", "//", "\0", "nan", "none",
        "python -m trainer --grace nan --checkpoint-dir", "exec python -m trainer --output_dir=$A", "bash -c", "cd",
        "A=$A$A$A\n" * 30, "cat <<E\n" * 5, "$(" * 30, "eval eval eval 'x", "&", "a & \\", "${A", "`",
    ]),
)  # fmt: skip
STRUCTURES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=4), st.integers()), inner, max_size=8),
    ),
    max_leaves=40,
)  # fmt: skip
TASKS = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, STRUCTURES))
RAW = st.lists(
    st.sampled_from([*KEYS, ": ", "\n", "- ", "  ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "!!bool ", "!!binary ",
                     "!!timestamp ", "!!set ", "!x ", "|\n  ", ">\n  ", "'", '"', "\\", "\\UFFFFFFFF", "---\n", "...\n",
                     "#", "? ", ", ", "%YAML 9", "\t", "\x85", "\u2028", "\ud800", "\0", "1", "y", "75", "A1000:8"]),
    max_size=40,
).map("".join)  # fmt: skip


def check_sane(text: str) -> None:
    found = linter.findings(text, grace_s=31)
    assert [finding.line for finding in found] == sorted(finding.line for finding in found)
    for finding in found:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", finding.name)
        assert finding.level in ("error", "warning")
        assert 1 <= finding.line <= max(1, len(text.splitlines()))
        assert len(linter.shown(finding, "x").splitlines()) == 2
        assert linter.shown(finding, "x").isascii() or finding.name == "not-yaml"


@settings(deadline=None, max_examples=30)
@given(st.one_of(STRUCTURES, TASKS))
def test_any_structure_is_looked_at_without_a_crash(structure: object) -> None:
    check_sane(yaml.safe_dump(structure, allow_unicode=True))


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.one_of(STRUCTURES, TASKS))
def test_more_structures_are_looked_at_without_a_crash(structure: object) -> None:
    check_sane(yaml.safe_dump(structure, allow_unicode=True))


@settings(deadline=None, max_examples=300)
@given(RAW)
def test_any_text_is_looked_at_without_a_crash(text: str) -> None:
    check_sane(text)


HOSTILE = [
    "[" * 5000,
    "{a: " * 5000,
    "a: &a [*a, *a]\nresources: *a\nrun: *a\n",
    "run: &r {setup: *r}\nenvs: *r\n",
    "num_nodes: 1" + "0" * 5000,
    "resources: {use_spot: !!bool x, accelerators: !!int {}}",
    'a: "\\UFFFFFFFF"',
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_deep_circular_and_mistyped_files_are_looked_at_without_a_crash(text: str) -> None:
    check_sane(text)


# -- what SkyPilot does ----------------------------------------------------------------------------------------------

ASKED = """
import json, os, sys
from sky import clouds, dag, task
from sky.skylet import constants
from sky.server import plugins
from sky.utils import dag_utils, registry

def outcome(config):
    try:
        made = task.Task.from_yaml_config(config)
        made.validate()
    except Exception as error:
        return "here: " + type(error).__name__
    try:
        for storage in made.storage_mounts.values():
            storage._validate_storage_spec(storage.name)
        chain = dag.Dag()
        chain.add(made)
        dag_utils.fill_default_config_in_dag_for_job_launch(chain)
    except Exception as error:
        return "server: " + type(error).__name__
    return "taken"

answers = [outcome(config) for config in json.load(sys.stdin)]
no_spot = sorted(
    name for name, cloud in registry.CLOUD_REGISTRY.items()
    if clouds.CloudImplementationFeatures.SPOT_INSTANCE in getattr(cloud, "_CLOUD_UNSUPPORTED_FEATURES", {})
)
os.environ[constants.ENV_VAR_IS_SKYPILOT_SERVER] = "1"
plugins._plugins_loaded = True
strict = outcome({"run": "x", "resources": {"job_recovery": {"max_restarts": 3}}})
strategies = sorted(registry.JOBS_RECOVERY_STRATEGY_REGISTRY)
print(json.dumps({"answers": answers, "no_spot": no_spot, "strict": strict, "strategies": strategies,
    "clouds": sorted(constants.ALL_CLOUDS)}))
"""


def mounted(**source: str) -> dict:
    return {"run": "x", "file_mounts": {"/c": source}}


def entries(*recoveries: object) -> dict:
    return {
        "run": "x",
        "resources": {"ordered": [{"cpus": at + 1, "job_recovery": r} for at, r in enumerate(recoveries)]},
    }


SKYPILOT = [
    (mounted(source="s3://bucket/p", mode="MOUNT"), "server: StorageModeError"),
    (mounted(source="s3://bucket/p"), "server: StorageModeError"),
    (mounted(source="s3://bucket/p", mode="MOUNT_CACHED"), "server: StorageModeError"),
    (mounted(source="cos://us-east/bucket/p", mode="MOUNT"), "server: StorageModeError"),
    (mounted(source="cos://us-east/bucket", mode="MOUNT"), "taken"),
    (mounted(source="s3://bucket/", mode="MOUNT"), "taken"),
    (mounted(source="s3://bucket/p", mode="COPY"), "taken"),
    (mounted(source="https://acc1.blob.core.windows.net/box/p", mode="MOUNT"), "taken"),
    (mounted(source="s3://bucket", name="other"), "server: StorageSpecError"),
    (mounted(name="s3://bucket"), "server: StorageNameError"),
    (mounted(source="/tmp"), "server: StorageNameError"),
    (entries("FAILOVER", {"strategy": "failover"}), "taken"),
    (entries("EAGER_NEXT_REGION", {"strategy": None}), "taken"),
    (entries("FAILOVER", "EAGER_NEXT_REGION"), "server: ValueError"),
    (entries({"recover_on_exit_codes": 75}, {"recover_on_exit_codes": [75]}), "server: ValueError"),
    (entries({"strategy": "none", "recover_on_exit_codes": [75]}, "EAGER_NEXT_REGION"), "taken"),
    ({"run": "x", "resources": {"job_recovery": {"max_restarts": 3}}}, "taken"),
]


def test_the_installed_skypilot_does_what_lint_says(tmp_path: Path) -> None:
    env = {**clean_env(), "HOME": str(tmp_path), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    configs = json.dumps([config for config, _ in SKYPILOT])
    done = subprocess.run(
        [sys.executable, "-c", ASKED], input=configs, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(zip(SKYPILOT, found["answers"], strict=True)) == [(case, case[1]) for case in SKYPILOT]
    assert found["strict"].startswith("here: "), "the server's schema refuses an unknown key of job_recovery"
    assert set(found["no_spot"]) == {*resources.NO_SPOT, "kubernetes"}
    assert found["clouds"] == sorted(ladder.CLOUDS)
    assert found["strategies"] == sorted(resources.STRATEGIES)


def test_lint_says_of_each_mount_what_skypilot_does() -> None:
    for config, answer in SKYPILOT:
        refused = [found for found in linter.findings(yaml.safe_dump(config)) if found.level == "error"]
        assert bool(refused) == (answer != "taken" or "max_restarts" in str(config)), config


def test_lint_loads_no_skypilot() -> None:
    code = "import skyspot.lint.linter, sys; print('sky' in sys.modules, 'jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), check=True)
    assert done.stdout.split() == ["False", "False"]
