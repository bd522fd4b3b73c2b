"""skyspot: task YAML for SkyPilot's managed spot jobs, and a rehearsal of what they will live through."""

__version__ = "0.1.0"
