"""Before a run: what it reads, the hosts that it is given and the links between them. Import the modules by name."""
