"""What runs beside the steps of a run: logs, guards, checkpoints, validation, profiles."""
