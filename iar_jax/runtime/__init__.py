"""Ground floor: mesh, checkpoints, logs, artifacts and the configuration."""
