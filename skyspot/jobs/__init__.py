"""SkyPilot's managed jobs: the client, launching, and the training beside each job."""
