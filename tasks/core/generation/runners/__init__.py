"""Where the work of a run is done: seats (device, threads), child processes, and what their deaths mean."""
