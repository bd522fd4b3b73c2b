"""The rules that a task YAML is checked against, by subject, each with a code."""
