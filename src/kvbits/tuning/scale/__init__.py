"""Several processes and hosts that work on one study."""
