"""The keys that SkyPilot 0.14.1 knows in a task YAML, after sky/utils/schemas.py; a test compares them with it."""

from __future__ import annotations

_RUNG = (
    "accelerator_args accelerators autostop cloud cpus disk_size disk_tier ephemeral_storage image_id infra "
    "instance_type job_recovery labels local_disk max_hourly_cost memory network_tier ports priority priority_class "
    "region use_spot volumes zone"
)
_BELOW_RUNG = {
    "accelerator_args": "gcp_queued_resource runtime_version tpu_name tpu_vm",
    "autostop": "down hook hook_timeout idle_minutes wait_for",
}
_TASK = {
    "": "api_server_access config envs event_callback file_mounts file_mounts_mapping inputs managed_secrets name "
    "num_nodes outputs pool resources run secrets service setup volume_mounts volumes workdir",
    "workdir": "ref url",
    "managed_secrets.*.*": "mount_path",
    "resources": f"{_RUNG} any_of ordered",
    **{f"resources.{key}": known for key, known in _BELOW_RUNG.items()},
    "resources.any_of.*": _RUNG,
    **{f"resources.any_of.*.{key}": known for key, known in _BELOW_RUNG.items()},
    "resources.ordered.*": _RUNG,
    **{f"resources.ordered.*.{key}": known for key, known in _BELOW_RUNG.items()},
    "file_mounts.*": "config mode name persistent source store type",
    "file_mounts.*.config": "attach_mode disk_size disk_tier mount mount_cached storage_type",
    "file_mounts.*.config.mount": "hf_mount_args read_only",
    "file_mounts.*.config.mount_cached": "buffer_size read_only transfers vfs_cache_max_age vfs_cache_max_size "
    "vfs_read_ahead vfs_read_chunk_size vfs_read_chunk_streams vfs_write_back",
    "volume_mounts.*": "is_ephemeral path sub_path volume_config volume_name",
    "config": "active_workspace azure docker gcp hooks kubernetes nvidia_gpus slurm ssh vast",
    "config.azure": "remote_identity vpc_name",
    "config.docker": "run_options",
    "config.gcp": "enable_gpu_direct enable_gvnic managed_instance_group placement_policy subnet_names vpc_name",
    "config.gcp.managed_instance_group": "provision_timeout run_duration",
    "config.hooks.*": "events run timeout",
    "config.kubernetes": "custom_metadata dws enable_docker kueue pod_config provision_timeout quota remote_identity "
    "set_pod_resource_limits",
    "config.kubernetes.dws": "enabled max_run_duration",
    "config.kubernetes.enable_docker": "cache_volume mode",
    "config.kubernetes.kueue": "admission_timeout local_queue_name",
    "config.nvidia_gpus": "disable_ecc",
    "config.slurm": "cpu_partition quota sbatch_options",
    "config.ssh": "custom_metadata pod_config provision_timeout",
    "config.vast": "create_instance_kwargs datacenter_only",
    "service": "load_balancer load_balancing_policy pool ports readiness_probe replica_policy replicas tls workers",
    "service.load_balancer": "stream_timeout_seconds",
    "service.pool": "downscale_delay_seconds max_workers min_workers queue_length_threshold upscale_delay_seconds "
    "workers",
    "service.readiness_probe": "consecutive_failure_threshold_timeout endpoint_probe_interval_seconds headers "
    "initial_delay_seconds path post_data timeout_seconds",
    "service.replica_policy": "base_ondemand_fallback_replicas downscale_delay_seconds dynamic_ondemand_fallback "
    "max_replicas min_replicas num_overprovision spot_placer target_qps_per_replica upscale_delay_seconds",
    "service.tls": "certfile keyfile",
}
KNOWN = {path: tuple(keys.split()) for path, keys in _TASK.items()}
"""The keys of each place in a task; `*` is every key of a mapping or item of a list. Other places allow any key."""
OPEN = ("config", "config.kubernetes", "config.slurm", "file_mounts.*.config")
"""The places where SkyPilot also accepts other keys: its server may know them, or they are ignored."""
JOB_RECOVERY = ("strategy", "max_restarts_on_errors", "recover_on_exit_codes")
HEADER = ("name", "execution", "primary_tasks", "termination_delay", "inter_connection")
"""The keys of the header document of a pipeline or job group."""
VOLUME = ("config", "infra", "labels", "name", "size", "type", "use_existing")
"""The keys of a volume for `sky volumes apply`."""
SETTINGS = (
    "active_workspace", "admin_policy", "allowed_clouds", "api_server", "aws", "azure", "daemons", "dashboard", "data",
    "db", "docker", "gcp", "jobs", "kubernetes", "logs", "metrics", "nebius", "nvidia_gpus", "oci", "plugins",
    "provision", "rbac", "serve", "slurm", "ssh", "vast", "workspace", "workspace_config", "workspaces",
)  # fmt: skip
"""The sections of SkyPilot's own settings in ~/.sky/config.yaml and .sky.yaml."""
