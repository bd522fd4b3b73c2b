"""SkyPilot's queue of managed jobs through the SDK, a line of JSON for each line read: sky is imported once."""

import json
import sys

import sky
import sky.jobs

FIELDS = [
    "job_id", "job_name", "status", "recovery_count", "failure_reason", "details", "schedule_state", "infra", "zone",
    "region", "cluster_resources", "task_id", "task_name", "current_cluster_name", "cluster_name_on_cloud",
    "submitted_at", "end_at",
]  # fmt: skip

answers = sys.stdout
sys.stdout = sys.stderr  # whatever SkyPilot prints
for _ in sys.stdin:
    try:
        records = sky.get(sky.jobs.queue_v2(refresh=False, fields=FIELDS))[0]
        jobs = [{key: value for key, value in dict(record).items() if value is not None} for record in records]
        for job in jobs:
            job["status"] = job["status"].value
        answer = {"jobs": jobs}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer, default=str), file=answers, flush=True)
