"""Price catalogs for tests, in the format of SkyPilot's (schema v8), written as a program would download them."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

COLUMNS = {
    "aws": "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,"
    "AvailabilityZone,Arch",
    "gcp": "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,"
    "SpotPrice",
    "azure": "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,Generation",
    "lambda": "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice",
    "runpod": "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,SpotPrice,Price,Region,AvailabilityZone,"
    "GpuInfo",
}
"""The columns of each cloud's vms.csv, in its order."""
GPU_INFO = "{'Gpus': [{'Name': 'GPU', 'Count': 8, 'MemoryInfo': {'SizeInMiB': 40960}}], 'TotalGpuMemoryInMiB': 327680}"
_NAMES = {"type": "InstanceType", "gpu": "AcceleratorName", "count": "AcceleratorCount", "cpus": "vCPUs",
          "memory": "MemoryGiB", "price": "Price", "spot": "SpotPrice", "region": "Region",
          "zone": "AvailabilityZone"}  # fmt: skip


def folder_of(runtime: Path, cloud: str) -> Path:
    """The folder of a cloud's catalog below SKY_RUNTIME_DIR."""
    return runtime / ".sky" / "catalogs" / "v8" / cloud


def write(runtime: Path, cloud: str, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write a cloud's catalog. Rows have the short names of _NAMES; what is missing is empty."""
    path = folder_of(runtime, cloud) / "vms.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = COLUMNS[cloud].split(",")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            named = {_NAMES.get(key, key): value for key, value in row.items()}
            writer.writerow({"GpuInfo": GPU_INFO if named.get("AcceleratorName") else "", **named})
    return path


def aws(regions: Sequence[str] = ("us-east-1", "us-west-2", "eu-west-1", "ap-northeast-1")) -> list[dict[str, object]]:
    """Machines of AWS: on-demand prices by region, spot prices by zone; some are missing, some are no bargain."""
    random.seed(1)
    types = [
        ("p4d.24xlarge", "A100", 8, 96, 1152, 32.77), ("p3.16xlarge", "V100", 8, 64, 488, 24.48),
        ("g5.48xlarge", "A10G", 8, 192, 768, 16.288), ("g5.xlarge", "A10G", 1, 4, 16, 1.006),
        ("g5.16xlarge", "A10G", 1, 64, 256, 4.096), ("p4de.24xlarge", "A100-80GB", 8, 96, 1152, 40.97),
        ("m6i.2xlarge", "", "", 8, 32, 0.384), ("c6i.4xlarge", "", "", 16, 32, 0.68),
        ("x9.8xlarge", "", "", 8, 64, 0.1),
    ]  # fmt: skip
    rows: list[dict[str, object]] = []
    for kind, gpu, count, cpus, memory, price in types:
        for at, region in enumerate(regions):
            for zone in range(1, 4):
                there = round(price * (1 + at / 10), 5)
                spot = (round(there * random.uniform(0.2, 0.9), 6), "", there)[(zone == 3) * random.choice([0, 1, 2])]
                rows.append(
                    {"type": kind, "gpu": gpu, "count": f"{count}.0" if count else "", "cpus": float(cpus),
                     "memory": float(memory), "price": there, "spot": spot, "region": region,
                     "zone": f"{region[:2]}{at}-az{zone}", "Arch": "x86_64"}
                )  # fmt: skip
    return rows


def gcp() -> list[dict[str, object]]:
    """Machines of Google Cloud: hosts and accelerators in rows of their own; some zones have only one of them."""
    random.seed(2)
    hosts = [
        ("a2-highgpu-1g", 12, 85, 0.95), ("a2-highgpu-8g", 96, 680, 7.5), ("g2-standard-4", 4, 16, 0.15),
        ("g2-standard-16", 16, 64, 0.6), ("g2-standard-96", 96, 384, 3.7), ("n1-standard-8", 8, 30, 0.38),
        ("n1-highmem-8", 8, 52, 0.47), ("n1-highmem-4", 4, 26, 0.24), ("n1-standard-16", 16, 60, 0.76),
        ("n1-highmem-64", 64, 416, 3.78), ("n2-standard-8", 8, 32, 0.39), ("n4-highcpu-16", 16, 32, 0.6),
        ("e2-standard-8", 8, 32, 0.2),
    ]  # fmt: skip
    gpus = [("A100", 1, 2.9), ("A100", 8, 23.5), ("L4", 1, 0.56), ("L4", 8, 4.5), ("V100", 1, 2.48), ("V100", 8, 19.84),
            ("T4", 1, 0.35), ("P4", 1, 0.6), ("tpu-v3-8", 1, 8.0)]  # fmt: skip
    rows: list[dict[str, object]] = []
    for at, region in enumerate(("us-central1", "europe-west4", "asia-east1")):
        for letter in "abc":
            zone = {"region": region, "zone": f"{region}-{letter}"}
            for name, cpus, memory, price in hosts:
                if not (letter == "b" and name.startswith("a2-highgpu-8g")):
                    there = round(price * (1 + at / 8), 5)
                    rows.append({**zone, "type": name, "cpus": float(cpus), "memory": float(memory), "price": there,
                                 "spot": round(there * 0.4, 5)})  # fmt: skip
            for name, count, price in gpus:
                if not (letter == "c" and name == "V100"):
                    there = round(price * (1 + at / 8), 5)
                    spot = "" if letter == "c" and name == "T4" else round(there * random.uniform(0.3, 0.6), 5)
                    rows.append({**zone, "gpu": name, "count": f"{count}.0", "price": there, "spot": spot})
    return rows


def azure() -> list[dict[str, object]]:
    """Machines of Azure, which has no zones in its catalog."""
    types = [("Standard_ND96asr_v4", "A100", 8, 96, 900, 27.2), ("Standard_D8s_v5", "", "", 8, 32, 0.384),
             ("Standard_E8-4s_v5", "", "", 4, 64, 0.1), ("Standard_E8s_v5", "", "", 8, 64, 0.504),
             ("Standard_F16s_v2", "", "", 16, 32, 0.677), ("Standard_D8as_v5", "", "", 8, 32, 0.3)]  # fmt: skip
    return [
        {"type": kind, "gpu": gpu, "count": f"{count}.0" if count else "", "cpus": float(cpus),
         "memory": float(memory), "price": round(price * (1 + at / 10), 4),
         "spot": round(price * (0.3 + at / 10), 4), "region": region, "Generation": 2}
        for kind, gpu, count, cpus, memory, price in types
        for at, region in enumerate(("eastus", "westeurope"))
    ]  # fmt: skip


def lambda_cloud() -> list[dict[str, object]]:
    """Machines of Lambda, which has no spot."""
    types = [("gpu_8x_a100", "A100", 8, 124, 1800, 10.32), ("gpu_8x_v100_n", "V100", 8, 88, 448, 6.32),
             ("gpu_1x_a10", "A10", 1, 30, 200, 0.75)]  # fmt: skip
    return [
        {"type": kind, "gpu": gpu, "count": f"{count}.0", "cpus": float(cpus), "memory": float(memory),
         "price": price, "region": region}
        for kind, gpu, count, cpus, memory, price in types
        for region in ("us-east-1", "europe-central-1")
    ]  # fmt: skip


def runpod() -> list[dict[str, object]]:
    """Machines of RunPod, which has zones of a single price."""
    return [
        {"type": f"{count}x_A100-80GB_SECURE", "gpu": "A100-80GB", "count": f"{count}.0", "cpus": 8.0 * count,
         "memory": 80.0 * count, "price": 1.64 * count, "spot": 0.82 * count, "region": region, "zone": zone}
        for count in (1, 2, 8)
        for region, zone in (("US", "US-KS-2"), ("US", "US-GA-1"), ("NO", "EU-NO-1"))
    ]  # fmt: skip


def write_all(runtime: Path) -> None:
    """Write every cloud's catalog."""
    made = {"aws": aws(), "gcp": gcp(), "azure": azure(), "lambda": lambda_cloud(), "runpod": runpod()}
    for cloud, rows in made.items():
        write(runtime, cloud, rows)
