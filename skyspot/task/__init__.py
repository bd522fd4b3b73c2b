"""The task YAML: templates, options, ladder, accelerators, buckets, payload, and the one reader of it."""
