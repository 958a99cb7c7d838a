"""How ranks start, stay alive, stop and end: launching, signals, exit codes, ownership of a run's folder, heartbeats, watchdog."""
