"""What a run costs: SkyPilot's catalog prices, the ladder with prices, and the comparison with on-demand."""
