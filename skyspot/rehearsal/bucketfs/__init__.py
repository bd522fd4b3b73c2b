"""A bucket as the machine sees it: every call is written down, some mounts refuse some, and a strike falls on one."""
