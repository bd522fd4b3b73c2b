"""A user's own task YAML: old spellings rewritten in today's, and the options of the command line put in."""
