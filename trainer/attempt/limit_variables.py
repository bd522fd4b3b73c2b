"""The variables that hold a run's limits. Loads nothing: the launcher looks at them before it starts its ranks."""

SPEND_VARIABLE, DEADLINE_VARIABLE = "SKYSPOT_MAX_SPEND", "SKYSPOT_DEADLINE"
ALLOWANCE_VARIABLE = "SKYSPOT_SPEND_ALLOWANCE"
