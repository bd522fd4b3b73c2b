"""SkyPilot's queue of managed jobs, a line of JSON for each line read: sky is imported once.

The function is SkyPilot's own. Its API server calls it too, but in a new process for each request, which imports sky:
seconds of a core for each answer.
"""

import json
import sys

from sky.jobs import utils

FIELDS = [
    "job_id", "job_name", "status", "recovery_count", "failure_reason", "details", "schedule_state", "infra", "zone",
    "region", "cluster_resources", "task_id", "task_name", "current_cluster_name", "cluster_name_on_cloud",
    "submitted_at", "end_at",
]  # fmt: skip

answers = sys.stdout
sys.stdout = sys.stderr  # whatever SkyPilot prints
for _ in sys.stdin:
    try:
        records = utils.get_managed_job_queue(fields=FIELDS)["jobs"]
        answer = {"jobs": [{key: value for key, value in record.items() if value is not None} for record in records]}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer, default=str), file=answers, flush=True)
