"""Catalog prices: each equals what SkyPilot's own functions answer for the same files."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import catalogs
import pytest
from support_sky import run_sky
from test_dryrun import NO_NETWORK

from skyspot.money import gcp, sizes
from skyspot.money.catalog import Row, enabled_clouds, read_catalog
from skyspot.money.offers import Ask, offers

# Answers questions of the form [function, arguments, cloud]; None: SkyPilot refuses or has no price.
ANSWERS = """
import json, math, sys
from sky import catalog, clouds, global_user_state, resources
from sky.catalog import aws_catalog, azure_catalog, gcp_catalog
given = json.loads(sys.stdin.read())
global_user_state.set_enabled_clouds(["GCP", "AWS", "Kubernetes"], clouds.CloudCapability.COMPUTE, "default")
global_user_state.set_enabled_clouds(["Azure"], clouds.CloudCapability.STORAGE, "default")
def answer(function, arguments, cloud):
    if function == "cost":  # of a whole machine on Google Cloud, host and accelerators
        return resources.Resources(cloud=clouds.GCP(), **arguments).get_cost(3600)
    found = getattr(catalog, function)(**arguments, clouds=cloud)
    return found[0] if function == "get_instance_type_for_accelerator" else found
def safe(*question):
    try:
        found = answer(*question)
    except (ValueError, AssertionError, KeyError):
        return None
    return None if isinstance(found, float) and math.isnan(found) else found
tables = {"hosts": gcp_catalog._ACC_INSTANCE_TYPE_DICTS, "cpus": gcp_catalog._NUM_ACC_TO_NUM_CPU,
          "ratio": gcp_catalog._DEFAULT_GPU_MEMORY_CPU_RATIO, "n1": gcp_catalog._DEFAULT_HOST_VM_FAMILY,
          "aws": aws_catalog._DEFAULT_INSTANCE_FAMILY, "gcp": gcp_catalog._DEFAULT_INSTANCE_FAMILY,
          "azure": azure_catalog._DEFAULT_INSTANCE_FAMILY}
print(json.dumps([[safe(*question) for question in given], tables]))
"""
# SkyPilot must not look for credentials in a cloud's metadata service, nor for newer files in the network.
NO_CLOUD = {**NO_NETWORK, "AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true"}
CLOUDS = tuple(catalogs.COLUMNS)
SPOT = (False, True)
Question = tuple[str, dict[str, Any], str]


def rows_of_file(runtime: Path, cloud: str) -> list[dict[str, str]]:
    path = catalogs.folder_of(runtime, cloud) / "vms.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_all(cloud: str) -> tuple[Row, ...]:
    found = read_catalog(cloud, None)
    return found.rows if found else ()


def price(row: Row, use_spot: bool) -> float | None:
    return row.spot if use_spot else row.on_demand


def ask(accelerator: str | None, count: float = 0, **more: Any) -> Ask:
    return Ask(**{"accelerator": accelerator, "count": count, "instance_type": None, "cpus": None, "memory": None,
                  "cloud": None, "region": None, "zone": None, **more})  # fmt: skip


def by_row(cloud: str, lines: list[dict[str, str]]) -> Iterator[tuple[Question, float | None]]:
    """For each row of a file, in both markets: what SkyPilot is asked, and what skyspot reads."""
    for line, row in zip(lines, read_all(cloud), strict=True):
        for use_spot in SPOT:
            if cloud == "lambda" and use_spot:
                assert row.spot is None
                continue
            place = {"region": line["Region"], "zone": line.get("AvailabilityZone") or None, "use_spot": use_spot}
            if cloud == "gcp" and not row.instance_type:
                arguments = {"acc_name": row.accelerator, "acc_count": int(row.number), **place}
                yield ("get_accelerator_hourly_cost", arguments, cloud), price(row, use_spot)
            else:
                yield ("get_hourly_cost", {"instance_type": row.instance_type, **place}, cloud), price(row, use_spot)


def by_machine(cloud: str) -> Iterator[tuple[Question, Any]]:
    """The instance types that SkyPilot takes for accelerators, with and without a limit; and its default ones."""
    rows = read_all(cloud)
    kinds = {
        (row.accelerator, row.number) for row in rows if row.accelerator and not row.accelerator.startswith("tpu-")
    }
    for name, count in sorted(kinds):
        for use_spot in SPOT[: 1 if cloud == "lambda" else 2]:
            prices = sorted(p for row in rows if row.accelerator == name and (p := price(row, use_spot)) is not None)
            for limit in (None, *([prices[len(prices) // 2], prices[0], prices[0] / 2] if prices else [])):
                arguments = {"acc_name": name, "acc_count": int(count), "use_spot": use_spot, "max_hourly_cost": limit}
                found = offers(cloud, ask(name, count), rows, use_spot=use_spot, limit=limit)
                types = {row.instance_type for row in found}
                yield ("get_instance_type_for_accelerator", arguments, cloud), types
    for cpus, memory in ((None, None), ("8", None), ("4+", "32+"), (None, "64+"), ("16+", "2x")):
        arguments = {"cpus": cpus, "memory": memory}
        found = offers(cloud, ask(None, cpus=cpus, memory=memory), rows, use_spot=False, limit=None)
        yield ("get_default_instance_type", arguments, cloud), {row.instance_type for row in found}


def whole_machines() -> Iterator[tuple[Question, float | None]]:
    """Each accelerator on Google Cloud with its host, by zone."""
    rows = read_all("gcp")
    for name, count in sorted({(row.accelerator, row.number) for row in rows if row.accelerator}):
        if name.startswith("tpu-"):
            continue
        for found in offers("gcp", ask(name, count), rows, use_spot=True, limit=None):
            for use_spot in SPOT:
                if (usd := price(found, use_spot)) is not None:
                    arguments = {"instance_type": found.instance_type, "accelerators": {name: int(count)},
                                 "region": found.region, "zone": found.zone, "use_spot": use_spot}  # fmt: skip
                    yield ("cost", arguments, "gcp"), usd


def differences(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, Any], int]:
    """Where SkyPilot's answers are not ours; its tables; the number of questions."""
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(runtime))
    asked: list[tuple[Question, Any]] = []
    for cloud in CLOUDS:
        lines = rows_of_file(runtime, cloud)
        asked += [*by_row(cloud, lines), *(by_machine(cloud) if lines else [])]
    asked += whole_machines()
    printed = run_sky(ANSWERS, runtime, [question for question, _ in asked], **NO_CLOUD)
    answers, tables = json.loads(printed.splitlines()[-1])
    return [
        (question, ours, theirs)
        for (question, ours), theirs in zip(asked, answers, strict=True)
        if not same(ours, theirs)
    ], tables, len(asked)  # fmt: skip


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, set):
        named = set(theirs) if isinstance(theirs, list) else {theirs} - {None}
        return ours == named
    return ours is theirs if ours is None or theirs is None else bool(ours == pytest.approx(theirs, rel=1e-12))


REAL = os.environ.get("SKYSPOT_CATALOGS")
"""A folder of real catalogs to compare, too; none by default."""


@pytest.mark.slow
@pytest.mark.parametrize("source", [None, *([Path(REAL).expanduser()] if REAL else [])], ids=str)
def test_every_price_is_skypilots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path | None) -> None:
    if source is None:
        catalogs.write_all(tmp_path)
    else:
        shutil.copytree(source, catalogs.folder_of(tmp_path, ""))
    different, tables, count = differences(tmp_path, monkeypatch)
    assert different == []
    assert count > (600 if source is None else 100)
    assert enabled_clouds() == ("aws", "gcp", "kubernetes"), "as SkyPilot has just written them"
    assert {name: {float(n): list(hosts) for n, hosts in one.items()} for name, one in gcp.HOSTS.items()} == {
        name: {float(n): hosts for n, hosts in one.items()} for name, one in tables["hosts"].items()
    }
    cpus = {name or "DEFAULT": {float(n): c for n, c in one.items()} for name, one in gcp.CPUS.items()}
    assert cpus == {name: {float(n): c for n, c in one.items()} for name, one in tables["cpus"].items()}
    assert (gcp.MEMORY_RATIO, list(gcp.N1)) == (tables["ratio"], tables["n1"])
    assert [begin.rstrip(".") for begin in sizes.FAMILIES["aws"]] == tables["aws"]
    assert sorted(begin.rstrip("-") for begin in sizes.FAMILIES["gcp"]) == sorted(tables["gcp"])
    assert tables["azure"] == ["Ds_v5", "Es_v5", "Fs_v2"]
