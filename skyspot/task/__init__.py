"""What a task YAML is: templates, options, ladder, accelerators, buckets, payload, and the one reader of it."""
