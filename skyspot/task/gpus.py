"""Accelerator names as SkyPilot's catalogs spell them, and suggestions for misspelled ones."""

from __future__ import annotations

import re
from dataclasses import dataclass

from skyspot.errors import UsageError, shown

# SkyPilot matches names exactly and would look for a misspelled one forever.
NAMES = (
    "A10", "A100", "A100-80GB", "A100-80GB-SXM", "A10G", "A16", "A30", "A40", "A4000", "A5000", "A6000", "A800",
    "B100", "B200", "B300", "GB200", "GB300", "GH200", "GTX1660S", "Gaudi HL-205", "H100", "H100-80GB", "H100-MEGA",
    "H100-NVL", "H100-NVLINK", "H100-SXM", "H200", "H200-SXM", "Inferentia", "Inferentia2", "K80", "L4", "L40",
    "L40S", "M4000", "M60", "MI100", "MI210", "MI250", "MI300X", "MI325X", "P100", "P4", "P40", "P4000", "P5000",
    "Quadro-RTX-6000", "RTX2000-Ada", "RTX3060", "RTX3070", "RTX3080", "RTX3080-Ti", "RTX3090", "RTX4000",
    "RTX4000-Ada", "RTX4080", "RTX4090", "RTX5000", "RTX5000-Ada", "RTX5060", "RTX5080", "RTX5090", "RTX6000",
    "RTX6000-Ada", "RTX6000Ada", "RTX8000", "RTXA4000", "RTXA4500", "RTXA5000", "RTXA6000", "RTXPRO6000",
    "RTXPRO6000S", "RTXPRO6000WS", "Radeon MI25", "Radeon Pro V520", "T4", "T4g", "TITAN V", "Trainium",
    "Trainium2", "V100", "V100-32GB", "tpu-v2", "tpu-v2-8", "tpu-v3", "tpu-v3-8", "tpu-v4", "tpu-v4-8",
    "tpu-v5litepod", "tpu-v5litepod-1", "tpu-v5litepod-4", "tpu-v5litepod-8", "tpu-v5p", "tpu-v5p-8", "tpu-v6e",
    "tpu-v6e-1", "tpu-v6e-4", "tpu-v6e-8",
)  # fmt: skip
# They come in every power of two.
_TPU = re.compile(r"tpu-v\d[a-z]*-\d{1,4}")
_PATTERN = re.compile(r"([A-Za-z][A-Za-z0-9 ._-]*?)(\*?)(?::(\d{1,4}))?")


@dataclass(frozen=True)
class Accelerators:
    """Kind and number of accelerators per node."""

    name: str
    count: int

    def __str__(self) -> str:
        return f"{self.name}:{self.count}"


def parse(text: str) -> list[list[Accelerators]]:
    """Parse `A100:8,L4:8` into one group per item, and `A100*:8` into one group of every A100 variant.

    Raises:
        UsageError: an unknown name (names the nearest), or an invalid count.
    """
    groups = []
    for item in text.split(","):
        found = _PATTERN.fullmatch(item.strip())
        if not found or found[3] == "0":
            raise UsageError(f"--gpus: {shown(item)} is not NAME:COUNT, like A100:8 (several: A100:8,L4:8)")
        name, count = found[1], int(found[3] or 1)
        if found[2]:
            lower = name.lower()
            kinds = [known for known in NAMES if known.lower() == lower or known.lower().startswith(f"{lower}-")]
            if not kinds:
                raise UsageError(f"--gpus: no accelerator matches {shown(name + '*')}.{did_you_mean_gpu(name)}")
            groups.append([Accelerators(kind, count) for kind in kinds])
            continue
        exact = next((known for known in NAMES if known.lower() == name.lower()), None)
        if exact is None and _TPU.fullmatch(name.lower()):
            exact = name.lower()
        if exact is None:
            raise UsageError(f"--gpus: unknown accelerator {shown(name)}.{did_you_mean_gpu(name)}")
        groups.append([Accelerators(exact, count)])
    return groups


def did_you_mean_gpu(name: str) -> str:
    """Return ` Did you mean 'A100'?` for `A1OO`, `A-100` or `A1000`; empty if no name is near."""
    memory = _MEMORY_BEHIND.fullmatch(name)
    plain = next((known for known in NAMES if memory and known.lower() == memory[1].lower()), None)
    if memory and plain and _NAMED_BY_MEMORY.get(plain) == int(memory[2]):
        return f" Did you mean {plain!r}?"
    if len(name) > _LONGEST:
        return ""
    costs = [(_cost(name.upper(), known.upper()), at, known) for at, known in enumerate(NAMES)]
    cost, _, nearest = min(costs)
    return f" Did you mean {nearest!r}?" if cost <= max(1.0, 0.4 * len(name)) else ""


_LONGEST = 24
"""Longer than any name, with room for typos; limits the cost of a comparison."""
_MEMORY_BEHIND = re.compile(r"([A-Za-z]+\d+)[-_ ]?(\d+)GB?", re.IGNORECASE)
# Memory of the plain name, if a variant with more memory has that in its name.
_NAMED_BY_MEMORY = {"A100": 40, "V100": 16}
# Characters that look alike.
_LOOK_ALIKE = ("O0", "Q0", "I1", "L1", "S5", "B8", "Z2")


def _cost(written: str, meant: str) -> float:
    """Edit distance between a written and a known name, with lower costs for likely typos.

    Confusing look-alike characters, separators, and doubling a character or missing a double cost less than an edit.
    Another first letter costs more, because it names another family.
    """
    row = [0.0]
    for j, character in enumerate(meant):
        row.append(row[-1] + _gap(character, meant[j - 1 : j]))
    for i, one in enumerate(written):
        before = written[i - 1 : i]
        above, row = row, [row[0] + _gap(one, before)]
        for j, other in enumerate(meant):
            swap = _swap(one, other) * (1.5 if i == j == 0 else 1.0)
            gaps = (above[j + 1] + _gap(one, before), row[j] + _gap(other, meant[j - 1 : j]))
            row.append(min(above[j] + swap, *gaps))
    return row[-1]


def _swap(one: str, other: str) -> float:
    if one == other:
        return 0.0
    if any(one in pair and other in pair for pair in _LOOK_ALIKE):
        return 0.1
    return 0.1 if one in "-_ " and other in "-_ " else 1.0


def _gap(character: str, before: str) -> float:
    return 0.2 if character in "-_ " else 0.5 if character == before else 1.0


def hints(groups: list[list[Accelerators]]) -> list[str]:
    """Suggest other variants of the requested accelerators."""
    requested = {accelerators.name for group in groups for accelerators in group}
    found = []
    for group in groups:
        first = group[0]
        if first.name == "A100" and "A100-80GB" not in requested:
            found.append(
                f"Hint: A100-80GB:{first.count} is often available when A100:{first.count} is not; "
                f"--gpus 'A100*:{first.count}' tries both."
            )
    return found
