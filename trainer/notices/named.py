"""The cloud that the environment names. Loads no network code: the launcher starts without any."""

from __future__ import annotations

import os

from trainer.layout.clouds import cloud_named

VARIABLES = {
    "AWS_EC2_METADATA_SERVICE_ENDPOINT": "aws",
    "GCE_METADATA_HOST": "gcp",
    "SKYSPOT_AZURE_METADATA": "azure",
}
"""Variables that name a metadata service, and so a cloud."""


def named() -> str:
    """The cloud that the environment names, in small letters; empty if it names none."""
    return next((cloud for variable, cloud in VARIABLES.items() if os.environ.get(variable)), "") or cloud_named()
